"""The pictures of a study's page. Each function takes the summary and returns a figure, or None without its data."""

from collections.abc import Callable
from typing import Any

from report.study_rows import HEADINGS, PLAIN, SMOOTHNESS, row_name

STYLES = {"one pass": ("C0", "o"), "distilled": ("C2", "^"), "mean of k": ("C1", "s")}  # colour and marker


def draw_overview(summary: dict) -> Any:
    """Draw each row's mean and interval: methods from the best to the worst, a colour for each way of answering."""
    from matplotlib.figure import Figure

    rows = _rows_with(summary, "nll")
    if not rows:
        return None
    best: dict[str, float] = {}
    for row in rows:
        best[row["method"]] = min(row["figures"]["nll"]["mean"], best.get(row["method"], float("inf")))
    methods = sorted(best, key=lambda method: -best[method])
    kinds = [kind for kind in STYLES if any(_kind(row) == kind for row in rows)]
    figure = Figure(figsize=(10, 1.4 + 0.4 * len(methods)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label in zip(
        panels, ("nll", "token_ece"), ("NLL, nats per answer token", "token ECE"), strict=True
    ):
        for number, kind in enumerate(kinds):
            shown = [row for row in rows if _kind(row) == kind and name in row["figures"]]
            means = [row["figures"][name]["mean"] for row in shown]
            # Not below 0, which rounding may give where all seeds have one value.
            below = [max(0, row["figures"][name]["mean"] - row["figures"][name]["low"]) for row in shown]
            above = [max(0, row["figures"][name]["high"] - row["figures"][name]["mean"]) for row in shown]
            offset = 0.5 * ((len(kinds) - 1) / 2 - number) / max(len(kinds), 2)
            places = [methods.index(row["method"]) + offset for row in shown]
            color, marker = STYLES[kind]
            style = {"color": color, "fmt": marker, "capsize": 3, "markersize": 5}
            axes.errorbar(means, places, xerr=[below, above], label=kind, **style)
        axes.set(xlabel=f"{label} (lower is better)")
        axes.grid(axis="x", alpha=0.3)
    _name_rows(panels[0], methods, summary)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(kinds), fontsize="small")
    return figure


def draw_tuning(summary: dict) -> Any:
    """Draw every value's validation NLL: methods from the best to the worst, darker dots for later values.

    What is far worse than the best of the worst method is drawn at the edge, as an arrow.
    """
    from matplotlib.figure import Figure

    if not summary["tuning"]:
        return None
    by_method = {name: tuned["nll"] for name, tuned in summary["tuning"].items()}
    methods = sorted(by_method, key=lambda name: -min(by_method[name]["one pass"]))
    bests = [min(nll) for by_answer in by_method.values() for nll in by_answer.values()]
    edge = max(bests) + 0.5 * (max(bests) - min(bests))
    figure = Figure(figsize=(10, 1.4 + 0.4 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(methods):
        for answer, nll in by_method[method].items():
            color, marker = STYLES["one pass" if answer == "one pass" else "mean of k"]
            offset = 0.0 if len(by_method[method]) == 1 else 0.15 if answer == "one pass" else -0.15
            for number, loss in enumerate(nll):
                alpha = 0.25 + 0.75 * number / max(len(nll) - 1, 1)
                shape = marker if loss <= edge else ">"
                axes.plot(min(loss, edge), place + offset, shape, color=color, alpha=alpha, markeredgewidth=0)
    for kind in ("one pass", "mean of k"):
        color, marker = STYLES[kind]
        axes.plot([], [], marker, color=color, label=kind)
    axes.set(xlabel="NLL of validation problems, nats per answer token (lower is better)")
    axes.grid(axis="x", alpha=0.3)
    _name_rows(axes, methods, summary)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    return figure


def _name_rows(axes: Any, methods: list[str], summary: dict) -> None:
    axes.set_yticks(range(len(methods)), methods)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in summary["study"]["references"] else "normal")


def draw_cost(summary: dict) -> Any:
    """Draw the NLL against the training time relative to plain, a marker for each way of answering."""
    from matplotlib.figure import Figure

    rows = [row for row in _rows_with(summary, "nll") if row["relative_seconds"] is not None]
    if not rows:
        return None
    colors = _method_colors(summary)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        style = {"color": colors[row["method"]], "marker": STYLES[_kind(row)][1], "s": 60, "edgecolors": "black"}
        axes.scatter(row["relative_seconds"], row["figures"]["nll"]["mean"], linewidths=0.5, **style)
    for method in dict.fromkeys(row["method"] for row in rows):
        axes.scatter([], [], color=colors[method], label=method)
    for kind in dict.fromkeys(map(_kind, rows)):
        axes.scatter([], [], color="white", edgecolors="black", marker=STYLES[kind][1], label=kind)
    axes.set(xscale="log", xlabel="training time, relative to plain", ylabel="NLL, nats per answer token")
    ticks = [
        tick for tick in (0.5, 1, 2, 3, 4, 6, 8, 16, 32) if tick <= 1.3 * max(row["relative_seconds"] for row in rows)
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def draw_smoothness(summary: dict) -> Any:
    """Draw the NLL against each measure of smoothness, a dot per network that answers without noise."""
    from matplotlib.figure import Figure

    rows = _rows_with(summary, SMOOTHNESS[0])
    if not rows:
        return None
    colors = _method_colors(summary)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(SMOOTHNESS), sharey=True)
    for axes, name in zip(panels, SMOOTHNESS, strict=True):
        for row in rows:
            by_seed, nll = row["figures"][name]["values"], row["figures"]["nll"]["values"]
            style = {"color": colors[row["method"]], "marker": STYLES[_kind(row)][1], "label": row_name(row)}
            axes.scatter(by_seed.values(), [nll[seed] for seed in by_seed], s=16, **style)
        axes.set(xlabel=HEADINGS[name])
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="NLL, nats per answer token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return figure


def draw_reliability(summary: dict) -> Any:
    """Draw accuracy against confidence of the generated answers of all seeds, a point per bin."""
    from matplotlib.figure import Figure

    rows = _rows_to_tell_apart(summary)
    if not rows:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="calibrated")
    for number, row in enumerate(rows):
        bins = row["curves"]["reliability"]
        total = sum(entry["count"] for entry in bins)
        x, y = [entry["confidence"] for entry in bins], [entry["accuracy"] for entry in bins]
        axes.plot(x, y, color=f"C{number}", linewidth=1, marker=".", label=f"{row['method']}, {row['answer']}")
        areas = [1200 * entry["count"] / total for entry in bins]  # square points
        axes.scatter(x, y, areas, color=f"C{number}", alpha=0.4, linewidths=0)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def draw_risk_coverage(summary: dict) -> Any:
    """Draw the share of wrong answers among the most confident ones, of all seeds."""
    from matplotlib.figure import Figure

    rows = _rows_to_tell_apart(summary)
    if not rows:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        coverage, risk = zip(*row["curves"]["risk_coverage"], strict=True)
        axes.plot(coverage, risk, label=f"{row['method']}, {row['answer']}")
    axes.set(xlabel="coverage", ylabel="risk (share of wrong answers)", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def draw_noise(summary: dict) -> Any:
    """Draw the learned noise of each site, first to last, over that at which it began."""
    return _draw_lines(
        summary,
        "noise",
        lambda noise: (range(len(noise)), [site["relative_std"] for site in noise]),
        {"xlabel": "site, from the input to the output", "ylabel": "learned std / initial std"},
    )


def draw_validation(summary: dict) -> Any:
    """Draw the validation NLL during training."""
    return _draw_lines(
        summary,
        "validation",
        lambda curve: ([entry["step"] for entry in curve], [entry["nll"] for entry in curve]),
        {"xlabel": "step", "ylabel": "validation NLL, nats per answer token"},
    )


PICTURES: list[tuple[str, str, Callable[[dict], Any]]] = [
    ("NLL and calibration on the test problems", "Mean over seeds, and its 99% interval.", draw_overview),
    (
        "The tuning",
        "A dot per value that was tried, the later in the list the darker; an arrow is further off than the axis.",
        draw_tuning,
    ),
    ("Cost against quality", "Mean over seeds. Lower and further left is better.", draw_cost),
    ("Smoothness beside generalization", "A dot per run; further left is smoother, lower is better.", draw_smoothness),
    ("Reliability of the generated answers", "All seeds together; a point is as large as its bin.", draw_reliability),
    ("Risk and coverage of the generated answers", "All seeds together.", draw_risk_coverage),
    ("Learned noise by depth", "Mean over seeds of each site's mean over channels.", draw_noise),
    ("Validation during training", "Mean over seeds; a run answers with its best step.", draw_validation),
]


def _draw_lines(summary: dict, key: str, points_of: Callable, labels: dict[str, str]) -> Any:
    """Draw one line per trained setting: answers that chose the same value come from the same runs."""
    from matplotlib.figure import Figure

    rows = {(row["method"], str(row["value"])): row for row in summary["rows"] if row[key]}
    if not rows:
        return None
    colors = _method_colors(summary)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    seen: set[str] = set()
    for (method, value), row in rows.items():
        width = 2.5 if method in summary["study"]["references"] else 1.2
        style = {"color": colors[method], "linewidth": width, "linestyle": "--" if method in seen else "-"}
        axes.plot(*points_of(row[key]), marker=".", label=f"{method} {value}", **style)
        seen.add(method)
    axes.set(**labels)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def _rows_with(summary: dict, figure: str) -> list[dict]:
    return [row for row in summary["rows"] if figure in row["figures"]]


def _rows_to_tell_apart(summary: dict) -> list[dict]:
    """Choose the generated answers of the references, of plain and of the best other for each number of passes."""
    rows = sorted((row for row in summary["rows"] if row["curves"]), key=lambda row: row["figures"]["nll"]["mean"])
    always = (*summary["study"]["references"], PLAIN)
    best_others = {row["num_passes"]: row for row in reversed(rows) if row["method"] not in always}
    return [row for row in rows if row["method"] in always or row in best_others.values()]


def _method_colors(summary: dict) -> dict[str, Any]:
    """Give every method a colour: the first reference black, others strong ones and then pale ones."""
    from matplotlib import colormaps

    colors, first = colormaps["tab20"], summary["study"]["references"][0]
    methods = dict.fromkeys([*summary["study"]["methods"], *(row["method"] for row in summary["rows"])])
    others = [method for method in methods if method != first]
    places = [(2 * number + number // 10) % 20 for number in range(len(others))]
    return {first: "black"} | {method: colors(place) for method, place in zip(others, places, strict=True)}


def _kind(row: dict) -> str:
    return row["answer"] if row["num_passes"] == 1 else "mean of k"
