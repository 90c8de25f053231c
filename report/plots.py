"""Plots of result files: losses by step, learned noise by layer and channel.

Matplotlib is imported by the functions that draw, so that tables and provenance work without it.
"""

from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from report.results import read_results


def plot_losses(result_files: list[str], path: str) -> None:
    """Draw the training NLL of each run by step, and its held-out NLL and exact match where they were measured.

    A DIP run's `loss` includes the prior; its data term, `nll`, is drawn, which compares with a plain run's `loss`.

    Args:
        result_files (`list[str]`): `results.json` files; each is labelled with the name of its folder.
        path (`str`): the picture; its ending chooses the format.

    Raises:
        ValueError: a file is missing, or none logged a loss.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    share: Any = None  # the axis of exact match
    for number, result_file in enumerate(result_files):
        log_history, label = read_results(result_file)["log_history"], Path(result_file).parent.name
        train, heldout = _curve(log_history, "nll"), _heldout_curve(log_history)
        if not len(train):
            train = _curve(log_history, "loss")
        if len(train):
            axes.plot(*train.T, color=f"C{number}", label=f"{label}, training NLL")
        if len(right := _curve(log_history, "eval_exact_match")):
            share = share or axes.twinx()
            share.plot(*right.T, color=f"C{number}", linestyle=":", marker="s", label=f"{label}, exact match")
        if len(heldout):
            axes.plot(*heldout.T, color=f"C{number}", linestyle="--", marker="o", label=f"{label}, held-out NLL")
    if not axes.lines:
        raise ValueError(
            f"No loss in {', '.join(map(str, result_files))}; lower training.logging_steps for the next run."
        )
    axes.set(xlabel="step", ylabel="nats per token", yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}" if high < 10 * low else "")  # over decades they would overlap
    if share is not None:
        share.set(ylabel="exact match", ylim=(-0.02, 1.02))
    figure.legend(loc="outside upper center", ncols=1 if len(result_files) == 1 else 2, fontsize="small")
    figure.savefig(path, dpi=150)


def plot_noise(result_file: str, path: str, sort_channels: bool = False) -> None:
    """Draw the learned standard deviation, in units of the channel's scale, by site (y) and channel (x).

    Args:
        result_file (`str`): `results.json` of a DIP run.
        path (`str`): the picture; its ending chooses the format.
        sort_channels (`bool`): order each site's channels by their noise, which shows the distributions.

    Raises:
        ValueError: the file is missing or of a run without noise.
    """
    from matplotlib.figure import Figure

    rows = read_results(result_file)["noise"]
    if not rows:
        raise ValueError(f"{result_file} is of a run without projections (dip: null); give the file of a DIP run.")
    widest = max(len(row["relative_std"]) for row in rows)
    std_ND = np.full((len(rows), widest), np.nan)
    for number, row in enumerate(rows):
        std_D = np.sort(row["relative_std"]) if sort_channels else row["relative_std"]
        std_ND[number, : len(std_D)] = std_D
    figure = Figure(figsize=(8, max(4, 1.5 + 0.16 * len(rows))), layout="constrained")  # the bar has a long label
    axes = figure.subplots()
    image = axes.imshow(std_ND, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize="small")
    axes.set(xlabel="channel, by noise" if sort_channels else "channel", ylabel="site")
    figure.colorbar(image, label="standard deviation, in units of the channel's scale")
    figure.savefig(path, dpi=150)


def plot_noise_level(result_file: str, path: str) -> None:
    """Draw the loss against the standard deviation of the noise: a line per site, and one for all of them.

    Args:
        result_file (`str`): what `recipes/noise_level.py` wrote.
        path (`str`): the picture; its ending chooses the format.

    Raises:
        ValueError: the file is missing.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    results = read_results(result_file)
    off, *rows = results["sweep"]  # the first row is without noise
    sites = list(dict.fromkeys(row["site"] for row in rows if row["site"] != "all"))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    by_depth = ScalarMappable(Normalize(0, max(len(sites) - 1, 1)), "viridis")
    for number, site in enumerate([*sites, "all"]):
        points = np.array([(row["std"], row["loss"]) for row in rows if row["site"] == site])
        if site == "all":
            axes.plot(*points.T, color="black", linewidth=2, label="all sites")
        else:
            axes.plot(*points.T, color=by_depth.to_rgba(np.array(number)), linewidth=0.8)
    figure.colorbar(by_depth, ax=axes, label="one site alone, by its number", ticks=[0, max(len(sites) - 1, 1)])
    axes.axhline(off["loss"], color="0.5", linestyle=":", label="noise off")
    axes.axvline(results["level"], color="0.5", linestyle="--", label=f"level {results['level']:.3g}")
    axes.set(xscale="log", xlabel="standard deviation, in units of the channel's scale", ylabel="nats per token")
    stds = sorted({row["std"] for row in rows})
    axes.set_xticks(stds, [f"{std:g}" for std in stds])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(path, dpi=150)


def _heldout_curve(log_history: list[dict]) -> np.ndarray:
    """The NLL up to the end of the training, or the first after it; others are of other problems or of ensembles."""
    on_the_way = _curve(list(takewhile(lambda entry: "train_runtime" not in entry, log_history)), "eval_nll")
    return on_the_way if len(on_the_way) else _curve(log_history, "eval_nll")[:1]


def _curve(log_history: list[dict], name: str) -> np.ndarray:
    return np.array([(entry["step"], entry[name]) for entry in log_history if name in entry])
