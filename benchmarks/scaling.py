"""How a DIPNet step and an ensemble's pass grow: with S, k, sequence length, hidden size and depth.

    python benchmarks/scaling.py                 # all curves, table, figure and benchmarks/results/scaling-<device>.*

One quantity is changed at a time, from a common point. The exponent of a power law is fitted to all points of a curve
(least squares in log-log); beside it is the local exponent between the last two points. A linear curve has exponent 1.
Times are medians of rounds in which all points take turns; peak memory is measured in one process per point. A
training step is that of `step.py` with all weights; k counts the samples of a pass without gradients. Not run on a GPU
yet.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import memory_in_own_process, peak_memory, results_path, time_round, write_results
from benchmarks.step import step
from dipnet_hf import DipConfig, DipTrainer, get_dip_model


class Point(NamedTuple):
    """All sizes of one measurement; `num_trajectories` is k of an ensemble's pass, 0 for a training step."""

    num_samples: int = 1
    num_trajectories: int = 0
    length: int = 128
    hidden_size: int = 256
    num_layers: int = 4


CURVES = {
    "S": ("num_samples", [1, 2, 4, 8]),
    "k": ("num_trajectories", [1, 2, 4, 8, 16]),
    "sequence length": ("length", [64, 128, 256, 512]),
    "hidden size": ("hidden_size", [128, 256, 512, 1024]),
    "layers": ("num_layers", [2, 4, 8, 16]),
}
VOCAB_SIZE, BATCH_SIZE = 2048, 2
if torch.cuda.is_available():
    CURVES |= {
        "sequence length": ("length", [512, 1024, 2048, 4096]),
        "hidden size": ("hidden_size", [1024, 2048, 4096]),
    }
    START = Point(length=1024, hidden_size=1024, num_layers=8)
else:
    START = Point()


def main(arguments: list[str] | None = None) -> None:
    """Measure every curve, print the table, write the result file and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--memory-of", nargs=len(Point._fields), type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        print(peak_memory(lambda: repeat(work_of(Point(*args.memory_of)), 2)))
        return

    rows = []
    for curve in tqdm(args.curves, desc="curves"):
        field, values = CURVES[curve]
        points = [START._replace(**{field: value}) for value in values]
        works = {str(value): work_of(point) for value, point in zip(values, points, strict=True)}
        repeat(lambda works=works: time_round(works, 0), 2)
        rounds = [time_round(works, number) for number in range(args.rounds)]
        seconds = [statistics.median(one[str(value)] for one in rounds) for value in values]
        memory = [memory_in_own_process(__file__, *point) for point in points]
        rows.append(
            {
                "quantity": curve,
                "values": values,
                "time_over_first": [time / seconds[0] for time in seconds],
                **exponents("time", values, seconds),
                "peak_mib": [peak / 2**20 for peak in memory],
                **exponents("memory", values, memory),
                "num_rounds": args.rounds,
            }
        )
    print_table(rows)
    write_results(__file__, {"start": START._asdict(), "vocab_size": VOCAB_SIZE, "batch_size": BATCH_SIZE}, rows=rows)
    draw(rows, results_path(__file__).with_suffix(".png"))


def work_of(point: Point) -> Callable[[], object]:
    """A function that runs a training step, or an ensemble's pass, at this point."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=point.hidden_size,
        intermediate_size=point.hidden_size * 8 // 3,
        num_hidden_layers=point.num_layers,
        num_attention_heads=point.hidden_size // 64,
        num_key_value_heads=point.hidden_size // 64,
        max_position_embeddings=point.length,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
    ids = torch.randint(VOCAB_SIZE, (BATCH_SIZE, point.length), device=model.device)
    batch = {"input_ids": ids, "labels": ids}
    config = DipConfig(weights="full", init_noise_std=0.05, num_samples=point.num_samples)
    model = get_dip_model(model, config, calibration=[batch])
    if point.num_trajectories:
        return lambda: answer(model.eval(), ids, point.num_trajectories)
    trainer = DipTrainer(model, TrainingArguments(output_dir="runs/benchmark", report_to=[], disable_tqdm=True))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    return lambda: step(trainer, batch)


def answer(model, ids: torch.Tensor, num_trajectories: int) -> None:
    """One pass of an ensemble."""
    with torch.no_grad(), model.ensemble(num_trajectories):
        model(input_ids=ids)


def repeat(work: Callable[[], object], times: int) -> None:
    """Run `work` several times."""
    for _ in range(times):
        work()


def exponents(name: str, values: list[int], measured: list[float]) -> dict[str, float]:
    """The exponent of a power law through all points, and that between the last two."""
    x, y = np.log(values), np.log(measured)
    return {
        f"{name}_exponent": float(np.polyfit(x, y, 1)[0]),
        f"{name}_last_exponent": float((y[-1] - y[-2]) / (x[-1] - x[-2])),
    }


def print_table(rows: list[dict]) -> None:
    """Print one line per curve."""
    print(f"{'quantity':<16} {'values':<22} time over the first         exponent (last)   memory exponent (last)")
    for row in rows:
        times = ", ".join(f"{time:.2f}" for time in row["time_over_first"])
        print(
            f"{row['quantity']:<16} {', '.join(map(str, row['values'])):<22} {times:<27} "
            f"{row['time_exponent']:.2f} ({row['time_last_exponent']:.2f})       "
            f"{row['memory_exponent']:.2f} ({row['memory_last_exponent']:.2f})"
        )


def draw(rows: list[dict], path: Path) -> None:
    """Draw time over the first point against the quantity over its first value, both logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharex=True, layout="constrained")
    for row in rows:
        growth = [value / row["values"][0] for value in row["values"]]
        memory = [peak / row["peak_mib"][0] for peak in row["peak_mib"]]
        axes[0].plot(growth, row["time_over_first"], marker="o", label=row["quantity"])
        axes[1].plot(growth, memory, marker="o", label=row["quantity"])
    for axis, title in zip(axes, ("time", "peak memory"), strict=True):
        axis.plot([1, 16], [1, 16], color="grey", linestyle=":", label="linear")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set(title=f"{title} over the first point", xlabel="quantity over its first value")
        axis.grid(alpha=0.3)
        ticks = [2**n for n in range(math.ceil(math.log2(axis.get_ylim()[1])))]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"Drawn in {path}")


if __name__ == "__main__":
    main()
