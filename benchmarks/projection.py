"""What the projection operator costs: forward and backward as a fraction of the bandwidth of a copy on the device.

    python benchmarks/projection.py              # all rows, table and benchmarks/results/projection-<device>.json

The forward pass moves the bytes of its input twice (read x, write u), the backward pass once (read the gradient); a
fraction is those bytes over time, divided by the same for `y.copy_(x)` in the same round. Peers are eq. (1) written in
PyTorch, which keeps its noise for the backward pass, and the same under torch.compile. Tensors on a GPU are larger
than its cache, and every timing is of several calls. Not run on a GPU yet.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import format_ratio, memory_in_own_process, peak_memory, summarize, time_round, write_results
from dipnet_hf.noise import project

if torch.cuda.is_available():
    DEVICE, DTYPE, SHAPES, NUM_CALLS = "cuda", torch.bfloat16, [(8, 2048, 2048), (8, 2048, 4096)], 50
else:
    DEVICE, DTYPE, SHAPES, NUM_CALLS = "cpu", torch.float32, [(2, 128, 1024), (8, 512, 1024)], 3
Sides = dict[str, Callable[[], object]]
torch._functorch.config.donated_buffer = False  # a compiled graph's backward pass is repeated here


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", nargs=2, metavar=("SHAPE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        print(memory_of(SHAPES[int(args.memory_of[0])], args.memory_of[1]))
        return

    rows = []
    for number, shape in enumerate(tqdm(SHAPES, desc="shapes")):
        for antithetic in (False, True):
            names = ["operator"] if antithetic else list(IMPLEMENTATIONS)
            memory = {name: memory_in_own_process(__file__, number, name) for name in names}
            for direction, sides in zip(("forward", "backward"), sides_of(shape, names, antithetic), strict=True):
                bandwidths = measure_bandwidths(sides, direction, args.rounds)
                rows += [
                    {
                        "shape": list(shape),
                        "antithetic": antithetic,
                        "direction": direction,
                        "implementation": name,
                        **bandwidths[name],
                        "peak_over_tensor": memory[name] / tensor_bytes(shape),
                        "num_rounds": args.rounds,
                    }
                    for name in names
                ]
    print_table(rows)
    write_results(__file__, {"dtype": str(DTYPE), "num_calls": NUM_CALLS}, rows=rows)


def eager(x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """Eq. (1) in plain PyTorch, with the noise as a tensor."""
    noise = torch.randn_like(x, dtype=torch.float32)
    return (x + scale * torch.exp(logvar / 2) * noise).to(x.dtype)


def operator(x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, antithetic: bool) -> torch.Tensor:
    """The library's: a Triton kernel on CUDA."""
    return project(x, logvar, scale, torch.tensor(0), antithetic)


IMPLEMENTATIONS = {"eager": eager, "compiled": torch.compile(eager), "operator": operator}


def sides_of(shape: tuple[int, ...], names: list[str], antithetic: bool) -> tuple[Sides, Sides]:
    """The forward passes, and the backward passes of graphs that are built here; both with a copy to compare with."""
    x = torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()
    logvar = torch.zeros(shape[-1], device=DEVICE, requires_grad=True)
    scale, target, gradient = torch.tensor(0.1, device=DEVICE), torch.empty_like(x), torch.ones_like(x)
    forwards: Sides = {"copy": repeated(lambda: target.copy_(x.detach()))}
    backwards: Sides = dict(forwards)
    for name in names:
        call = IMPLEMENTATIONS[name]
        u = call(x, logvar, scale, antithetic)
        forwards[name] = repeated(lambda call=call: call(x, logvar, scale, antithetic))
        backwards[name] = repeated(lambda u=u: torch.autograd.grad(u, [x, logvar], gradient, retain_graph=True))
    return forwards, backwards


def repeated(work: Callable[[], object]) -> Callable[[], None]:
    """A function that calls `work` several times, long enough to be timed."""

    def calls() -> None:
        for _ in range(NUM_CALLS):
            work()

    return calls


def measure_bandwidths(sides: Sides, direction: str, num_rounds: int) -> dict[str, dict]:
    """Each side's fraction of a copy's bandwidth, and its seconds; a copy moves the tensor's bytes twice."""
    time_round(sides, 0)
    rounds = [time_round(sides, number) for number in range(num_rounds)]
    share = 1.0 if direction == "forward" else 0.5  # of the bytes of a copy
    return {
        name: {
            **summarize("copy_bandwidth", [share * seconds["copy"] / seconds[name] for seconds in rounds]),
            "seconds": statistics.median(seconds[name] for seconds in rounds) / NUM_CALLS,
        }
        for name in sides
    }


def tensor_bytes(shape: tuple[int, ...]) -> int:
    """The bytes of one tensor of this shape."""
    return torch.Size(shape).numel() * DTYPE.itemsize


def memory_of(shape: tuple[int, ...], name: str) -> int:
    """Bytes at the peak of the forward and backward pass, above the input but with its gradient."""
    x = torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()
    logvar = torch.zeros(shape[-1], device=DEVICE, requires_grad=True)
    scale, gradient = torch.tensor(0.1, device=DEVICE), torch.ones_like(x)
    small = torch.zeros(1, 1, shape[-1], device=DEVICE, dtype=DTYPE, requires_grad=True)
    IMPLEMENTATIONS[name](small, logvar, scale, False).sum().backward()  # compiles it before the measurement

    def both() -> None:
        IMPLEMENTATIONS[name](x, logvar, scale, False).backward(gradient)

    return peak_memory(both)


def print_table(rows: list[dict]) -> None:
    """Print one line per case."""
    print(f"{'shape':>18} {'pairs':>6} {'':>9} {'implementation':>15}  copy bandwidth (quartiles)  peak / tensor")
    for row in rows:
        print(
            f"{'x'.join(map(str, row['shape'])):>18} {row['antithetic']!s:>6} {row['direction']:>9} "
            f"{row['implementation']:>15}  {format_ratio(row, 'copy_bandwidth'):<27} {row['peak_over_tensor']:>8.2f}"
        )


if __name__ == "__main__":
    main()
