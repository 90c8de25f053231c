"""What bounds the projection's kernels: the instructions of their machine code against the time that their bytes take.

    python benchmarks/instructions.py            # table and benchmarks/results/instructions-cpu.json; needs no GPU

Triton's own compiler makes the machine code for each GPU, and an element's instructions are counted in it: the forward
kernel's, and those of the backward kernel's loop, as often as it runs, and around it. A GPU issues the instructions of
four warps a cycle and multiprocessor. That time over the time of the element's bytes, at the memory's nominal
bandwidth, tells which of the two is the floor: above 1 no kernel of so many instructions reaches the bandwidth of a
copy. It is a bound of what is possible and no measurement. The GPUs' figures are those of their data sheets.
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
ISSUED_A_CYCLE = 4 * 32  # of one multiprocessor: four schedulers, each of which serves a warp of 32 elements


class Gpu(NamedTuple):
    """Compute capability, multiprocessors, boost clock in Hz and memory bandwidth in bytes a second."""

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
                    instructions = instructions_an_element(compiled, direction, antithetic)
                    issue_time = instructions / (gpu.num_multiprocessors * ISSUED_A_CYCLE * gpu.clock)
                    memory_time = (4 if direction == "forward" else 2) / gpu.bandwidth  # bfloat16: read, and written
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
    source = ASTSource(
        kernel,
        types,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in (*pointers, "hidden_size")},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})


def _num_blocks() -> int:
    return kernels._ROWS_PER_PROGRAM // kernels._blocks(HIDDEN_SIZE // 4)[0]


def instructions_an_element(compiled, direction: str, antithetic: bool) -> float:
    """The instructions that a thread executes at most, over the elements that it handles."""
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
    """Print one line a kernel."""
    print(f"{'GPU':>5} {'':>9} {'pairs':>6} {'functions':>12}  instructions an element  issue time over memory time")
    for row in rows:
        functions = "approximate" if row["approximate_functions"] else "exact"
        print(
            f"{row['gpu']:>5} {row['direction']:>9} {row['antithetic']!s:>6} {functions:>12}  "
            f"{row['instructions_an_element']:>23.1f} {row['issue_time_over_memory_time']:>28.2f}"
        )


if __name__ == "__main__":
    main()
