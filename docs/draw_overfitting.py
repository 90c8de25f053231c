"""Draw the picture of the README: held-out NLL after each epoch, with DIPNet and without.

    python docs/draw_overfitting.py

Reads results of `recipes/finetune.py`, one per seed, and writes `docs/pictures/overfitting.png`. Run it again when
they change.
"""

import json
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "results"
RUNS = {
    "plain fine-tuning": "smollm2-svamp-200-lora-plain-seed*.json",
    "DIPNet, default": "smollm2-svamp-200-lora-dip-seed*.json",
    "DIPNet, std 0.06": "smollm2-svamp-200-lora-std0.06-seed*.json",
}
PICTURE = ROOT / "docs" / "pictures" / "overfitting.png"


def main() -> None:
    """Draw the runs side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, pattern), color in zip(RUNS.items(), ("#7f7f7f", "#f4b183", "#e8710a"), strict=True):
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]
        curves = [validation_curve(run["log_history"]) for run in runs]
        epochs = [epoch for epoch, _ in curves[0]]
        losses = [[loss for _, loss in curve] for curve in curves]
        means = [statistics.mean(at_epoch) for at_epoch in zip(*losses, strict=True)]
        axes.fill_between(
            epochs,
            list(map(min, zip(*losses, strict=True))),
            list(map(max, zip(*losses, strict=True))),
            color=color,
            alpha=0.2,
        )
        axes.plot(epochs, means, marker="o", color=color)
        seeds = f"{len(runs)} seeds" if len(runs) > 1 else "1 seed"
        axes.annotate(
            f"{label}\n({seeds})", (epochs[-1], means[-1]), xytext=(8, -8), textcoords="offset points", color=color
        )
    axes.set(xlabel="epoch", ylabel="NLL, nats per token, lower is better")
    axes.set_title("SmolLM2-135M on 200 problems, scored on 50 others: mean and range over seeds", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)
    figure.savefig(PICTURE, dpi=150)
    print(PICTURE.relative_to(ROOT))


def validation_curve(log_history: list[dict]) -> list[tuple[float, float]]:
    """Epoch and NLL of the evaluations during training; those after the last epoch are of the test problems."""
    curve: dict[float, float] = {}
    for entry in log_history:
        if "eval_nll" in entry:
            curve.setdefault(entry["epoch"], entry["eval_nll"])
    return sorted(curve.items())


if __name__ == "__main__":
    main()
