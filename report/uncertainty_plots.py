"""Plots of uncertainty: metrics by ensemble size, reliability, risk against coverage, and a text coloured by token.

`groups` maps a label to `(confidence, correct)`, as `dipnet_hf.uncertainty` takes them. Matplotlib is imported by the
functions that draw; the tokens' layout is plain Python.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from dipnet_hf.uncertainty import (
    Values,
    area_under_risk_coverage,
    expected_calibration_error,
    reliability_bins,
    risk_coverage,
)

COLOR_MAP = "YlOrRd"
COLUMNS = 88  # letters per line of text
# A letter of DejaVu Sans Mono is 0.602 times as wide as its size. Here that is exactly 13 pixels at 150 dpi, so that
# hinting does not move letters.
COLUMN_WIDTH = 13 / 150  # inches
FONT_SIZE = 72 * COLUMN_WIDTH / 0.602  # points
LINE_HEIGHT = 0.26  # inches


def plot_against_samples(
    rows: Sequence[Mapping[str, Any]], path: str, metric: str = "nll", label: str | None = None
) -> None:
    """Draw a metric against the number of samples k: each method's mean over seeds, with a band of one deviation.

    Args:
        rows (`Sequence[dict]`): `{"method": str, "num_samples": int or None, "seed": int, metric: float}`, one
            per method, k and seed. None is one pass without noise: it is drawn as a dashed line over all k.
        path (`str`): the picture; its ending chooses the format.
        metric (`str`): the column to draw.
        label (`str`, *optional*): of the y axis; by default `metric`.

    Raises:
        ValueError: no row has a `num_samples`, a row has one below 1 or lacks a column, or two rows have the same
            method, k and seed.
    """
    from matplotlib.figure import Figure

    curves = _curves(rows, metric)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (method, by_samples) in enumerate(curves.items()):
        color = f"C{number % 10}"
        if values := by_samples.get(None):
            center, spread = _mean_and_spread(values)
            axes.axhline(center, color=color, linestyle="--", label=f"{method} (one pass)")
            axes.axhspan(center - spread, center + spread, color=color, alpha=0.15, linewidth=0)
        if samples := sorted(k for k in by_samples if k is not None):
            centers, spreads = np.array([_mean_and_spread(by_samples[k]) for k in samples]).T
            axes.plot(samples, centers, color=color, marker="o", label=method)
            axes.fill_between(samples, centers - spreads, centers + spreads, color=color, alpha=0.15, linewidth=0)
    ticks = sorted({k for by_samples in curves.values() for k in by_samples if k is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="number of samples k", ylabel=label or metric)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def _curves(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, dict[int | None, list[float]]]:
    """Collect `{method: {num_samples: [one value per seed]}}`."""
    curves: dict = {}
    seen = set()
    for row in rows:
        if missing := {"method", "num_samples", "seed", metric} - row.keys():
            raise ValueError(f"A row has no {', '.join(sorted(missing))}; it has {', '.join(sorted(row))}.")
        method, num_samples, seed = key = row["method"], row["num_samples"], row["seed"]
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, or None for one pass without noise, got {num_samples}.")
        if key in seen:
            raise ValueError(
                f"Two rows of {method} have num_samples={num_samples} and seed={seed}; give one row per seed, or draw "
                "each task or setting in a plot of its own."
            )
        seen.add(key)
        curves.setdefault(method, {}).setdefault(num_samples, []).append(row[metric])
    if not any(num_samples for _, num_samples, _ in seen):
        raise ValueError(f"None of the {len(rows)} rows has a num_samples to draw {metric} against.")
    return curves


def _mean_and_spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def plot_reliability(
    groups: Mapping[str, tuple[Values, Values]], path: str, num_bins: int = 15, binning: str = "width"
) -> None:
    """Draw accuracy against confidence, one point per bin, as large as its share of the answers. Labels give the ECE.

    Args:
        path (`str`): the picture; its ending chooses the format.
        num_bins, binning: as in `dipnet_hf.uncertainty.reliability_bins`.

    Raises:
        ValueError: there are no groups, or their data are not confidences and 0 or 1.
    """
    from matplotlib.figure import Figure

    _check_groups(groups)
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for number, (label, (confidence, correct)) in enumerate(groups.items()):
        bins = reliability_bins(confidence, correct, num_bins, binning)
        ece = expected_calibration_error(confidence, correct, num_bins, binning)
        x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
        areas = [1200 * row["count"] / len(correct) for row in bins]  # square points
        color = f"C{number % 10}"
        axes.plot(x, y, color=color, linewidth=1, marker=".", label=f"{label}, ECE {ece:.3f}")
        axes.scatter(x, y, areas, color=color, alpha=0.4, linewidths=0)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)


def plot_risk_coverage(groups: Mapping[str, tuple[Values, Values]], path: str) -> None:
    """Draw risk, the share of wrong answers among the most confident ones, against coverage, their share of all.

    The label has the AURC. The most confident answers may be tied: left of its first point, a curve is the expected
    risk of a random part of them.

    Args:
        path (`str`): the picture; its ending chooses the format.

    Raises:
        ValueError: there are no groups, or their data are not confidences and 0 or 1.
    """
    from matplotlib.figure import Figure

    _check_groups(groups)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (label, (confidence, correct)) in enumerate(groups.items()):
        coverage, risk = risk_coverage(confidence, correct)
        area = area_under_risk_coverage(confidence, correct)
        marker = "o" if len(coverage) <= 32 else None  # few points, as of shares of k answers
        color = f"C{number % 10}"
        axes.plot(coverage, risk, color=color, marker=marker, markersize=4, label=f"{label}, AURC {area:.3f}")
        axes.hlines(risk[0], 0, coverage[0], color=color)
    axes.set(xlabel="coverage", ylabel="risk (share of wrong answers)", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_tokens(
    tokens: Sequence[str], values: Values, path: str, title: str = "nats by token", vmax: float | None = None
) -> None:
    """Draw a text, each token on a background coloured by its value in nats: an entropy, an information, an NLL.

    Letters that DejaVu Sans Mono does not have show as boxes; `write_tokens_html` shows all letters.

    Args:
        tokens (`Sequence[str]`): decoded one by one, with their spaces. A newline shows as `↵` and begins a line.
        values: one per token, at least 0; a sequence of numbers, an array or a tensor.
        path (`str`): the picture; its ending chooses the format.
        vmax (`float`, *optional*): values from here on have the darkest colour; give pictures that are compared the
            same. By default it is the largest of `values`.

    Raises:
        ValueError: there are no tokens, not one value for each, a value is negative or not finite, or `vmax` is not
            positive.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    colors, scale = _token_colors(tokens, values, vmax)
    cells = _layout(tokens)
    num_lines = cells[-1][1] + 1
    # In inches: letters have a fixed size, so the axes must too.
    margin, top, bottom = 0.25, 0.42, 0.75
    text_width, text_height = COLUMNS * COLUMN_WIDTH, num_lines * LINE_HEIGHT
    width, height = text_width + 2 * margin, text_height + top + bottom
    figure = Figure(figsize=(width, height))
    box = (margin / width, bottom / height, text_width / width, text_height / height)
    axes = figure.add_axes(box, xlim=(0, COLUMNS), ylim=(num_lines, 0))
    axes.set_axis_off()
    for number, line, column, text in cells:
        background, ink = colors[number]
        axes.add_patch(Rectangle((column + 0.05, line + 0.05), len(text) - 0.1, 0.9, color=background, linewidth=0))
        first = column + len(text) - len(text.lstrip())
        axes.text(
            first, line + 0.7, text.strip(), color=ink, size=FONT_SIZE, family="DejaVu Sans Mono", parse_math=False
        )
    figure.text(margin / width, 1 - 0.28 / height, title, size=11, weight="bold", parse_math=False)
    bar = figure.add_axes((margin / width, 0.5 / height, 0.4, 0.12 / height))
    figure.colorbar(scale, cax=bar, orientation="horizontal", label="nats", ticks=MaxNLocator(4))
    figure.savefig(path, dpi=150)


def write_tokens_html(
    tokens: Sequence[str], values: Values, path: str, title: str = "nats by token", vmax: float | None = None
) -> None:
    """Write what `plot_tokens` draws as one HTML file that needs no others; a token's tooltip shows its value.

    The arguments and errors are those of `plot_tokens`.
    """
    from matplotlib.colors import to_hex

    colors, scale = _token_colors(tokens, values, vmax)
    spans = [
        f'<span style="background:{background};color:{ink}" title="{float(value):.3g} nats">'
        f"{html.escape(_visible(token))}</span>"
        for token, value, (background, ink) in zip(tokens, values, colors, strict=True)
    ]
    stops = ",".join(to_hex(color) for color in scale.to_rgba(np.linspace(0, scale.norm.vmax, 9)))
    page = PAGE.format(title=html.escape(title), text="".join(spans), stops=stops, vmax=f"{scale.norm.vmax:.3g}")
    Path(path).write_text(page, encoding="utf-8")


PAGE = """<!DOCTYPE html>
<html>
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="margin:2em;font-family:sans-serif">
<h1 style="font-size:1.2em">{title}</h1>
<pre style="white-space:pre-wrap;max-width:88ch;line-height:1.6">{text}</pre>
<p>0 <span style="display:inline-block;width:16em;height:0.8em;background:linear-gradient(to right,{stops})"></span>
{vmax} nats</p>
</body>
</html>
"""


def _token_colors(tokens: Sequence[str], values: Values, vmax: float | None):
    """Give each token's `(background, ink)`, and the `ScalarMappable` that a colour bar takes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_hex

    if not len(tokens) or len(values) != len(tokens):
        raise ValueError(f"Each token needs one value, got {len(tokens)} tokens and {len(values)} values.")
    nats = np.array([float(value) for value in values])
    if (wrong := np.flatnonzero(~((nats >= 0) & (nats < np.inf)))).size:
        raise ValueError(
            f"values must be finite and not negative, got {nats[wrong[0]]:.6g} for token {wrong[0]}; "
            "leave out tokens without a value, and give -log p for log-probabilities."
        )
    if vmax is not None and not vmax > 0:
        raise ValueError(f"vmax must be positive, got {vmax}.")
    scale = ScalarMappable(Normalize(0, vmax or nats.max() or 1.0), COLOR_MAP)
    scale.set_array(nats)
    rgb = scale.to_rgba(nats)[:, :3]
    luminance = rgb**2.2 @ [0.2126, 0.7152, 0.0722]
    inks = np.where(luminance > 0.18, "black", "white").tolist()  # at 0.18 both have the same contrast
    return [(to_hex(color), ink) for color, ink in zip(rgb, inks, strict=True)], scale


def _visible(token: str) -> str:
    """Make a token visible: `↵` before each newline, spaces for tabs, no control characters, `∅` if it is empty."""
    text = token.replace("\r\n", "\n").replace("\t", "    ")
    text = "".join(
        letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return text.replace("\n", "↵\n") or "∅"


def _layout(tokens: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """Wrap the tokens into lines of `COLUMNS` letters: cells `(token's number, line, column, text)`."""
    cells, line, column = [], 0, 0
    for number, token in enumerate(tokens):
        for row, text in enumerate(_visible(token).split("\n")):
            # A newline within the token, or too little room for it.
            if row or (column and column + len(text) > COLUMNS):
                line, column = line + 1, 0
            for start in range(0, len(text), COLUMNS):  # more than one only for a token longer than a line
                if start:
                    line, column = line + 1, 0
                part = text[start : start + COLUMNS]
                cells.append((number, line, column, part))
                column += len(part)
    return cells


def _check_groups(groups: Mapping[str, tuple[Values, Values]]) -> None:
    if not groups:
        raise ValueError("groups is empty; give {label: (confidence, correct)}.")
