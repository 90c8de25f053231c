"""What `recipes/diagnose.py` measured, as a table and as pictures: the networks of runs beside one another.

Matplotlib is imported by the functions that draw.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from report.tables import format_table

DISTURBANCES = {
    "embedding_noise": ("noise", "noise in the embeddings"),
    "layer_noise": ("noise", "noise at every layer"),
    "weight_noise": ("noise", "noise in the trained weights"),
    "fgsm": ("attack", "FGSM on the embeddings"),
    "pgd": ("attack", "PGD on the embeddings"),
}


def format_diagnosis(results: dict) -> str:
    """Lay out the main figures: a line per figure, a column per network.

    Args:
        results (`dict`): the content of a `diagnosis.json`.
    """
    columns = {label: _figures(network) for label, network in results["networks"].items()}
    headings = list(dict.fromkeys(heading for figures in columns.values() for heading in figures))
    rows = [
        (heading, *(f"{figures[heading]:.4g}" if heading in figures else "-" for figures in columns.values()))
        for heading in headings
    ]
    return format_table(("", *columns), rows)


def _figures(network: dict) -> dict[str, float]:
    """The main figures of one network by their headings."""
    figures = {"NLL": network["scores"]["nll"], "ECE": network["scores"]["ece"]}
    if "shifted_scores" in network:
        figures |= {"shifted NLL": network["shifted_scores"]["nll"], "shifted ECE": network["shifted_scores"]["ece"]}
    for place, constants in network.get("lipschitz", {}).items():
        for output in ("logits", "loss"):
            figures[f"Lipschitz of {output}, {place}, median"] = _relative(constants, output, median)
    if "lipschitz" in network:
        changes = [change for constants in network["lipschitz"].values() for change in constants["last_change"]]
        figures["Lipschitz of logits, last change, worst"] = max(changes)
    if "curvature" in network:
        curvature = network["curvature"]
        figures["Hessian, top eigenvalue"] = curvature["hessian_top"]
        figures["Hessian, trace"] = curvature["hessian_trace"]["mean"]
        figures["GGN, top eigenvalue"] = curvature["ggn_top"]
    for name, (instrument, title) in DISTURBANCES.items():
        for row in network.get(instrument, {}).get(name, []):
            if row["radius"]:
                figures[f"NLL, {title}, {row['radius']:g}"] = row["nll"]
    if "plane" in network:
        losses = [loss for row in network["plane"]["loss"] for loss in row]
        figures["plane, mean NLL - NLL"] = mean(losses) - network["scores"]["nll"]
    return figures


def _relative(constants: dict, output: str, of_tokens: Any) -> float:
    """A Lipschitz constant per move as far as a typical token is from zero."""
    return of_tokens(constants[output]) * constants["token_norm"]


def draw_diagnosis(results: dict, folder: Path) -> list[Path]:
    """Draw what was measured into PNG files of a folder.

    Args:
        results (`dict`): the content of a `diagnosis.json`.

    Returns:
        `list[Path]`: the pictures, one for each kind of instrument that was read.
    """
    networks = results["networks"]
    drawers: dict[str, tuple[Callable[[dict], Any], dict]] = {
        "lipschitz.png": (_draw_lipschitz, {k: n["lipschitz"] for k, n in networks.items() if "lipschitz" in n}),
        "robustness.png": (_draw_robustness, {k: n for k, n in networks.items() if {"noise", "attack"} & n.keys()}),
        "plane.png": (_draw_planes, {k: n["plane"] for k, n in networks.items() if "plane" in n}),
        "line.png": (_draw_lines, results.get("lines", {})),
        "noise.png": (_draw_noise, {k: r for k, r in results["runs"].items() if "learned_noise" in r}),
    }
    paths = []
    for name, (draw, values) in drawers.items():
        if values:
            draw(values).savefig(folder / name, dpi=90)
            paths.append(folder / name)
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_lipschitz(networks: dict[str, dict]) -> Any:
    """Above the constants by place, below their distribution over tokens; logits left, loss right."""
    figure = _figure(10, 7)
    for column, output in zip(figure.subplots(2, 2).T, ("logits", "loss"), strict=True):
        by_place, by_token = column
        for number, (label, places) in enumerate(networks.items()):
            sizes_PN = np.array([np.array(p[output]) * p["token_norm"] for p in places.values()])
            low, middle, high = np.quantile(sizes_PN, [0.25, 0.5, 0.75], axis=1)
            by_place.plot(middle, color=f"C{number}", marker="o", label=label)
            by_place.fill_between(range(len(places)), low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            at_embeddings = np.sort(sizes_PN[0])
            by_token.plot(np.arange(1, len(at_embeddings) + 1) / len(at_embeddings), at_embeddings, color=f"C{number}")
        by_place.set_xticks(range(len(places)), list(places))
        by_place.set(yscale="log", ylabel=f"{output}, relative", title=f"Lipschitz constants of the {output}")
        by_token.set(yscale="log", xlabel="share of the tokens", ylabel=f"{output} at the embeddings, relative")
    figure.legend(*by_place.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _draw_robustness(networks: dict[str, dict]) -> Any:
    """NLL against the radius, a panel per disturbance."""
    measured = [
        (name, title)
        for name, (instrument, title) in DISTURBANCES.items()
        if any(name in network.get(instrument, {}) for network in networks.values())
    ]
    figure = _figure(3.2 * len(measured), 3.8)
    for axes, (name, title) in zip(np.ravel(figure.subplots(1, len(measured))), measured, strict=True):
        instrument = DISTURBANCES[name][0]
        for number, (label, network) in enumerate(networks.items()):
            rows = network.get(instrument, {}).get(name, [])
            axes.plot([r["radius"] for r in rows], [r["nll"] for r in rows], f"C{number}", marker=".", label=label)
        axes.set(title=title, xlabel="radius, relative")
        axes.title.set_size("medium")
    np.ravel(figure.axes)[0].set_ylabel("NLL, nats per token")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _draw_planes(networks: dict[str, dict]) -> Any:
    """The loss above that of the trained weights, on one scale of colours for all networks."""
    figure = _figure(3.3 * len(networks), 3.6)
    rises = {}
    for label, plane in networks.items():
        loss = np.array(plane["loss"])
        center = plane["steps"].index(0.0)
        rises[label] = loss - loss[center, center]
    levels = np.linspace(min(rise.min() for rise in rises.values()), max(rise.max() for rise in rises.values()), 21)
    for axes, (label, rise) in zip(np.ravel(figure.subplots(1, len(networks))), rises.items(), strict=True):
        steps = networks[label]["steps"]
        drawn = axes.contourf(steps, steps, rise, levels=levels)
        axes.contour(steps, steps, rise, levels=levels[::2], colors="white", linewidths=0.5)
        axes.plot(0, 0, "r+")
        axes.set(title=label, aspect="equal")
        axes.title.set_size("small")
    figure.colorbar(drawn, ax=figure.axes, label="NLL above the center, nats")
    return figure


def _draw_lines(lines: dict[str, list[float]]) -> Any:
    """The loss on lines between runs."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    for label, losses in lines.items():
        if label != "fractions":
            axes.plot(lines["fractions"], losses, marker=".", label=label)
    for end in (0, 1):
        axes.axvline(end, color="0.6", linestyle=":")
    axes.set(xlabel="part of the way", ylabel="NLL, nats per token")
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _draw_noise(runs: dict[str, dict]) -> Any:
    """Left the learned noise by depth; right how far the samples disagree about right and wrong tokens."""
    compared = {label: run["disagreement"] for label, run in runs.items() if "disagreement" in run}
    figure = _figure(9 if compared else 5, 4)
    by_depth, *others = np.ravel(figure.subplots(1, 2 if compared else 1))
    for number, (label, run) in enumerate(runs.items()):
        by_depth.plot(run["learned_noise"]["ratio_by_depth"], f"C{number}", marker=".", label=label)
    by_depth.axhline(1, color="0.6", linestyle=":")
    by_depth.set(xlabel="site", ylabel="learned std / initial std", title="by depth, geometric mean over channels")
    by_depth.xaxis.get_major_locator().set_params(integer=True)
    by_depth.legend(fontsize="small")
    for by_token in others:
        _draw_disagreement(by_token, compared)
    return figure


def _draw_disagreement(by_token: Any, runs: dict[str, dict]) -> None:
    """The distribution over tokens of what the samples disagree on, of right ones and of wrong ones."""
    for number, (label, disagreement) in enumerate(runs.items()):
        correct = np.array(disagreement["correct"], dtype=bool)
        nats = np.array(disagreement["mutual_information"])
        for chosen, name, style in ((correct, "right", "-"), (~correct, "wrong", "--")):
            values = np.sort(nats[chosen])
            shares = np.arange(1, len(values) + 1) / max(len(values), 1)
            by_token.plot(values, shares, f"C{number}", linestyle=style, label=f"{label}, {name}")
    by_token.set(xscale="log", xlabel="mutual information of the samples, nats", ylabel="share of the tokens")
    by_token.legend(fontsize="small")
