"""Draw the picture of the results: what each method does to plain fine-tuning's loss and calibration, study by study.

    python docs/draw_studies.py

Reads the studies' `study.json` and writes `docs/pictures/studies.png`. Run it again when a study is reported.
"""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results" / "study"
SIGNIFICANCE = 0.01  # what a study asks of p
STUDIES = {
    "smollm2-svamp": "SmolLM2-135M\nSVAMP, 200 problems",
    "stories260k-svamp": "260K Llama\nSVAMP, 100 problems",
    "stories260k-svamp-600": "260K Llama\nSVAMP, 600 problems",
    "stories260k-gsm8k": "260K Llama\nGSM8K, 100 problems",
    "stories260k-aqua": "260K Llama\nAQuA-RAT, 154 problems",
    "word-problems": "0.87M Llama\nword problems, 300",
}
METHODS = {  # (method, answer) to its name
    ("dip", "one pass"): "DIPNet",
    ("dip", "distilled"): "DIPNet, its mean distilled",
    ("dip_r_drop", "one pass"): "R-Drop on DIPNet's noise",
    ("dip_self_distillation", "one pass"): "self-distillation on DIPNet's noise",
    ("dropout_self_distillation", "one pass"): "self-distillation on dropout",
    ("r_drop", "one pass"): "R-Drop on dropout",
    ("dip_twice_as_long", "one pass"): "DIPNet, twice the steps",
    ("plain_twice_as_long", "one pass"): "plain, twice the steps",
}
COLORS = {"better": "#1a7f37", "worse": "#c0392b"}  # of what a study shows at p < 0.01
GREY = "#8a8a8a"
FIGURES = {
    "nll": "NLL minus plain's, % of plain's",
    "token_ece": "token ECE minus plain's, percentage points",
}
PICTURE = ROOT / "docs" / "pictures" / "studies.png"


def main() -> None:
    """Draw a column for each study, its losses above its calibration errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7), layout="constrained")
    studies = [json.loads((RESULTS / name / "study.json").read_text(encoding="utf-8")) for name in STUDIES]
    lines = figure.subfigures(2)
    for line, (name, label) in zip(lines, FIGURES.items(), strict=True):
        panels = line.subplots(1, len(STUDIES), sharey=True)
        for axes, study in zip(panels, studies, strict=True):
            draw(axes, study, name)
        line.supxlabel(label, fontsize="medium")
        if line is lines[0]:
            for axes, title in zip(panels, STUDIES.values(), strict=True):
                axes.set_title(title, fontsize="medium")
    figure.suptitle(
        "Each dot is a seed, against plain of the same seed, both at their best epoch; further left is better, and "
        "scales differ.\nGreen: shown to be better at p < 0.01; red: worse; grey: not shown to differ; hollow: not "
        "tested, or too few seeds to show anything.",
        fontsize="medium",
    )
    figure.savefig(PICTURE, dpi=120)
    print(f"wrote {PICTURE.name}")


def draw(axes, study: dict, figure: str) -> None:
    """Draw the methods' seeds and their mean, each in a line of its own; a method that did not run has none."""
    rows = {(row["method"], row["answer"]): row["figures"].get(figure) for row in study["rows"]}
    plain = rows["plain", "one pass"]["values"]
    axes.axvline(0, color="black", linewidth=0.8)
    for line, method in enumerate(METHODS):
        if not rows.get(method):
            continue
        values = rows[method]["values"]
        changes = [change(values[seed], plain[seed], figure) for seed in values if seed in plain]
        shown = verdict(study, method, figure)
        color = COLORS.get(shown, GREY)
        face = "none" if shown is None else color
        axes.scatter(changes, [line] * len(changes), s=14, facecolors=face, edgecolors=color, alpha=0.4, lw=0.8)
        axes.scatter(statistics.mean(changes), line, s=60, marker="|", color=color, lw=1 if shown is None else 2.5)
    axes.set_yticks(range(len(METHODS)), METHODS.values())
    axes.set_ylim(len(METHODS) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def change(value: float, plain: float, figure: str) -> float:
    """Loss in percent of plain's, calibration error in percentage points beside plain's."""
    return 100 * (value / plain - 1) if figure == "nll" else 100 * (value - plain)


def verdict(study: dict, method: tuple[str, str], figure: str) -> str | None:
    """What the study says of a method against plain; `None` if it does not compare them, or has too few seeds to."""
    for comparison in study["comparisons"]:
        asked = (comparison["reference"], comparison["answer"], comparison["figure"])
        other = (comparison["method"], comparison["other_answer"])
        if asked == (*method, figure) and other == ("plain", "one pass"):
            return comparison["verdict"] if comparison["smallest_p_value"] < SIGNIFICANCE else None
    return None


if __name__ == "__main__":
    main()
