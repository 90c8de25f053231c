"""What bounds the projection's kernels: the instructions of their machine code against the time that their bytes take.

    python benchmarks/instructions.py            # table and benchmarks/results/instructions-cpu.json; needs no GPU

Triton's own compiler makes the machine code for each GPU, and the instructions per element are counted in it; those in
the backward kernel's loop count as often as the loop runs. Per cycle, a multiprocessor issues instructions for four
warps. The table has the time to issue an element's instructions over the time to move its bytes at the memory's
nominal bandwidth. Above 1, no kernel with so many instructions reaches the bandwidth of a copy. This is a bound, not a
measurement. The GPUs' figures are those of their data sheets.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import write_results
from dipnet_hf.kernels import projection as kernels

HIDDEN_SIZE = 2048
NUM_WARPS = 4  # Triton's default
ISSUED_PER_CYCLE = 4 * 32  # in one multiprocessor: by four schedulers, each for a warp of 32 threads


class Gpu(NamedTuple):
    """Compute capability, multiprocessors, boost clock in Hz and memory bandwidth in bytes per second."""

    capability: int
    num_multiprocessors: int
    clock: float
    bandwidth: float


GPUS = {
    "A100": Gpu(80, 108, 1.41e9, 2.04e12),
    "H100": Gpu(90, 132, 1.98e9, 3.35e12),
    "H200": Gpu(90, 132, 1.98e9, 4.8e12),
}


def main() -> None:
    """Compile, count, print the table and write the result file."""
    rows = []
    for name, gpu in GPUS.items():
        for direction in ("forward", "backward"):
            for antithetic in (False, True):
                for approximate in (True, False):
                    compiled = compile_kernel(direction, gpu.capability, antithetic, approximate)
                    instructions = instructions_per_element(compiled, direction, antithetic)
                    issue_time = instructions / (gpu.num_multiprocessors * ISSUED_PER_CYCLE * gpu.clock)
                    # A bfloat16 element is read and written, or only read.
                    memory_time = (4 if direction == "forward" else 2) / gpu.bandwidth
                    rows.append(
                        {
                            "gpu": name,
                            "direction": direction,
                            "antithetic": antithetic,
                            "approximate_functions": approximate,
                            "instructions_an_element": instructions,
                            "issue_time_over_memory_time": issue_time / memory_time,
                        }
                    )
    print_table(rows)
    config = {"hidden_size": HIDDEN_SIZE, "dtype": "bfloat16", "triton": triton.__version__}
    write_results(__file__, config, rows=rows)


def compile_kernel(direction: str, capability: int, antithetic: bool, approximate: bool):
    """Compile one of the kernels as a launch on a bfloat16 tensor of `HIDDEN_SIZE` channels would."""
    block_p, block_g = kernels._blocks(HIDDEN_SIZE // 4)
    constants = {
        "ANTITHETIC": antithetic,
        "APPROXIMATE": approximate,
        "NUM_ROUNDS": kernels._NUM_ROUNDS,
        "BLOCK_P": block_p,
        "BLOCK_G": block_g,
    }
    if direction == "forward":
        kernel, pointers = kernels._project_kernel, {"x_ptr": "*bf16", "std_ptr": "*fp32", "u_ptr": "*bf16"}
        constants["PER_CHANNEL"] = True
    else:
        kernel, pointers = kernels._noise_gradient_kernel, {"grad_ptr": "*bf16", "partial_ptr": "*fp32"}
        constants["NUM_BLOCKS"] = _num_blocks()
    types = {
        **pointers,
        "key": "i64",
        "num_pairs": "i32",
        "hidden_size": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    places = {name: (kernel.arg_names.index(name),) for name in types}
    # At a launch Triton finds the pointers aligned and the hidden size divisible by 16, and compiles for that.
    source = ASTSource(
        kernel,
        types,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in (*pointers, "hidden_size")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})


def _num_blocks() -> int:
    return kernels._ROWS_PER_PROGRAM // kernels._blocks(HIDDEN_SIZE // 4)[0]


def instructions_per_element(compiled, direction: str, antithetic: bool) -> float:
    """The largest number of instructions that a thread executes, over the number of elements that it handles."""
    block_p, block_g = kernels._blocks(HIDDEN_SIZE // 4)
    num_elements = block_p * block_g * 4 * (1 + antithetic) / (32 * NUM_WARPS)
    lines = disassemble(compiled).splitlines()
    total = sum(map(is_instruction, lines))
    if direction == "forward":
        return total / num_elements
    in_loop = max(map(len, loops(lines)))
    return (total - in_loop + _num_blocks() * in_loop) / (_num_blocks() * num_elements)


def disassemble(compiled) -> str:
    """The machine code as text, by the disassembler that Triton brings."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def is_instruction(line: str) -> bool:
    """Whether a disassembled line is an instruction that does anything."""
    return re.match(r"\s+/\*[0-9a-f]{4,}\*/", line) is not None and "NOP" not in line


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions between a label and a branch back to it."""
    labels: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = number
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if branch and branch[1] in labels:
            found.append([line for line in lines[labels[branch[1]] : number + 1] if is_instruction(line)])
    return found


def print_table(rows: list[dict]) -> None:
    """Print one line per kernel."""
    print(f"{'GPU':>5} {'':>9} {'pairs':>6} {'functions':>12}  instructions per element  issue time over memory time")
    for row in rows:
        functions = "approximate" if row["approximate_functions"] else "exact"
        print(
            f"{row['gpu']:>5} {row['direction']:>9} {row['antithetic']!s:>6} {functions:>12}  "
            f"{row['instructions_an_element']:>24.1f} {row['issue_time_over_memory_time']:>28.2f}"
        )


if __name__ == "__main__":
    main()
