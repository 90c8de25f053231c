"""Draw the picture of the README: held-out NLL after each epoch, with DIPNet and without.

    python docs/draw_overfitting.py

Reads three results of `recipes/finetune.py` and writes `docs/pictures/overfitting.png`. Run it again when they change.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = {
    "plain fine-tuning": "recipes/results/smollm2-svamp-200-lora-plain-seed0.json",
    "DIPNet, default": "recipes/results/smollm2-svamp-200-lora-dip-seed0.json",
    "DIPNet, std 0.06": "recipes/results/smollm2-svamp-200-lora-std0.06-seed0.json",
}
PICTURE = ROOT / "docs" / "pictures" / "overfitting.png"


def main() -> None:
    """Draw the runs side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (label, path), color in zip(RUNS.items(), ("#7f7f7f", "#f4b183", "#e8710a"), strict=True):
        results = json.loads((ROOT / path).read_text(encoding="utf-8"))
        epochs, losses = zip(*validation_curve(results["log_history"]), strict=True)
        axes.plot(epochs, losses, marker="o", color=color)
        axes.annotate(label, (epochs[-1], losses[-1]), xytext=(8, -4), textcoords="offset points", color=color)
    axes.set(xlabel="epoch", ylabel="NLL, nats per token, lower is better")
    axes.set_title("SmolLM2-135M on 200 problems, scored on 50 others (seed 0)", fontsize="medium")
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
