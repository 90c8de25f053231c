"""What the benchmarks share: seconds in interleaved rounds, peak memory in a process of its own, result files.

What is measured is up to the scripts, one per question.
"""

import contextlib
import gc
import io
import json
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from report import provenance

RESULTS = Path(__file__).parent / "results"


def time_round(sides: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    """Run each side once and return its seconds; the order rotates with the round's `number`."""
    names = list(sides)
    first = number % len(names)
    return {name: seconds(sides[name]) for name in names[first:] + names[:first]}


def seconds(work: Callable[[], object]) -> float:
    """Run `work` and return its seconds, those of the device included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device, if there is one to wait for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(name: str, ratios: Sequence[float]) -> dict[str, float | list[float]]:
    """The median and the quartiles of the rounds' ratios, as entries of a row."""
    quartiles = statistics.quantiles(ratios, n=4)
    return {name: statistics.median(ratios), f"{name}_quartiles": [quartiles[0], quartiles[2]]}


def format_ratio(row: dict, name: str) -> str:
    """What `summarize` made, for a table: the median and, in brackets, the quartiles."""
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.3f} ({low:.3f}-{high:.3f})"


def memory_in_own_process(script: str, *case: object) -> int:
    """The bytes that a fresh process of `script` prints when it is asked for `--memory-of` a case.

    On a GPU this process measures them itself: the allocator knows what a case adds, and starting another takes long.
    """
    if torch.cuda.is_available():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(script)["main"](["--memory-of", *map(str, case)])
        return int(printed.getvalue().split()[-1])
    command = [sys.executable, script, "--memory-of", *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes at the peak of `work` above what the process held before."""
    if torch.cuda.is_available():
        gc.collect()  # trainers are in reference cycles
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - held
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """This process's resident memory, now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def results_path(script: str) -> Path:
    """The path of a script's result file on this device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return RESULTS / f"{Path(script).stem}-{device}.json"


def write_results(script: str, config: dict, **results: list[dict]) -> None:
    """Write `results/<script>-<device>.json`, with its provenance, and say where it is."""
    path = results_path(script)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(script, config, seed=0), **results}, indent=2) + "\n")
    print(f"Written to {path}")
