"""What a noise sample buys: the variance of the gradient per FLOP, for independent samples and for pairs.

    python benchmarks/gradient_variance.py       # table, figure and benchmarks/results/gradient_variance-cpu.*

The model is the real 260K-parameter Llama on GSM8K with every decoder layer projected; gradients are of eq. (2) alone.
The noise's part is their variance over draws for a fixed batch of problems, summed over all weights. The data's part
is the variance of noise-free gradients over batches. FLOPs are those that PyTorch's counter sees in a step.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, set_seed

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import results_path, write_results
from dipnet_hf import DipConfig, dip_loss, get_dip_model
from recipes.config import load_config
from recipes.data import make_collator, prepare_data
from recipes.running import load_tokenizer

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "stories260k-gsm8k-300.yaml"
BATCH_SIZE = 4
NUM_DATA_BATCHES = 32
NOISE_STDS = (0.1, 0.3)
SAMPLINGS = ("independent", "pairs")
CASES = [(1, "independent")] + [(num_samples, sampling) for num_samples in (2, 4, 8) for sampling in SAMPLINGS]


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table, write the result file and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as finetune.py's")
    parser.add_argument("--draws", type=int, default=12, help="gradients of one batch at each S")
    parser.add_argument("--batches", type=int, default=2, help="fixed batches that the noise's part is averaged over")
    parser.add_argument("--steps", type=int, default=100, help="fine-tuning steps before the second state")
    args = parser.parse_args(arguments)

    config = load_config(CONFIG, args.set)
    tokenizer = load_tokenizer(config)
    rows = prepare_data(config, tokenizer).train
    collate = make_collator(tokenizer)
    starts = range(0, len(rows) - BATCH_SIZE, BATCH_SIZE)
    batches = [collate([rows[start + i] for i in range(BATCH_SIZE)]) for start in starts]

    results = []
    states = [(std, num_steps) for std in NOISE_STDS for num_steps in (0, args.steps)]
    for std, num_steps in tqdm(states, desc="states"):
        set_seed(0)
        base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
        dip = DipConfig(weights="full", init_noise_std=std, prior_weight=0.0)
        model = get_dip_model(base, dip, calibration=batches[:4]).train()
        fine_tune(model, batches, num_steps, config.training["learning_rate"])
        results += measure(model, batches, args.batches, args.draws, {"noise_std": std, "num_steps": num_steps})
    print_table(results)
    settings = {"config": CONFIG.name, "batch_size": BATCH_SIZE, "num_draws": args.draws, "num_batches": args.batches}
    write_results(__file__, settings, rows=results)
    draw(results, results_path(__file__).with_suffix(".png"))


def fine_tune(model, batches: list[dict], num_steps: int, learning_rate: float) -> None:
    """Train with S = 1 at a constant rate."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for number in range(num_steps):
        dip_loss(model, batches[number % len(batches)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(model, batches: list[dict], num_batches: int, num_draws: int, state: dict) -> list[dict]:
    """The rows of one state of the model."""
    with model.deterministic():
        of_batches = torch.stack([gradient(model, batch) for batch in batches[:NUM_DATA_BATCHES]])
    of_data, mean_square = float(of_batches.var(0).sum()), float(of_batches.mean(0).square().sum())
    rows = []
    for num_samples, sampling in CASES:
        vars(model.base_model.active_dip_config).update(num_samples=num_samples, sampling=sampling)
        of_noise = [total_variance(gradient(model, b) for _ in range(num_draws)) for b in batches[:num_batches]]
        flops = count_flops(model, batches[0])
        first = rows[0] if rows else {"noise_variance": statistics.mean(of_noise), "flops": flops}
        noise_ratio, flops_ratio = statistics.mean(of_noise) / first["noise_variance"], flops / first["flops"]
        total = (of_data + statistics.mean(of_noise)) / (of_data + first["noise_variance"])
        rows.append(
            {
                **state,
                "num_samples": num_samples,
                "sampling": sampling,
                "noise_variance": statistics.mean(of_noise),
                "noise_variance_std": statistics.stdev(of_noise),
                "data_variance": of_data,
                "mean_gradient_square": mean_square,
                "flops": flops,
                "noise_variance_ratio": noise_ratio,
                "flops_ratio": flops_ratio,
                "noise_variance_times_flops": noise_ratio * flops_ratio,
                "noise_share": statistics.mean(of_noise) / (of_data + statistics.mean(of_noise)),
                "total_variance_times_flops": total * flops_ratio,
            }
        )
    return rows


def gradient(model, batch: dict) -> torch.Tensor:
    """One estimate of the gradient with respect to the network's own weights, as a vector."""
    model.zero_grad()
    dip_loss(model, batch).loss.backward()
    named = [(name, p) for name, p in model.named_parameters() if p.grad is not None and "dip_" not in name]
    return torch.cat([parameter.grad.flatten() for _, parameter in named]).clone()


def total_variance(gradients: Iterator[torch.Tensor]) -> float:
    """The unbiased variance of vectors, summed over their entries."""
    return float(torch.stack(list(gradients)).var(0).sum())


def count_flops(model, batch: dict) -> int:
    """The FLOPs of a step's forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        dip_loss(model, batch).loss.backward()
    return counter.get_total_flops()


def print_table(rows: list[dict]) -> None:
    """Print one line per row."""
    print(f"{'std':>4} {'steps':>5} {'S':>2} {'':<13}  noise variance  FLOPs  product  noise share  total product")
    for row in rows:
        print(
            f"{row['noise_std']:>4} {row['num_steps']:>5} {row['num_samples']:>2} {row['sampling']:<13}  "
            f"{row['noise_variance_ratio']:>14.3f} {row['flops_ratio']:>6.2f} "
            f"{row['noise_variance_times_flops']:>8.2f} "
            f"{row['noise_share']:>12.2f} {row['total_variance_times_flops']:>14.2f}"
        )


def draw(rows: list[dict], path: Path) -> None:
    """Draw the noise's variance times FLOPs over S, one panel per noise level."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(NOISE_STDS), figsize=(9, 4.6), sharey=True, layout="constrained")
    for axis, std in zip(axes, NOISE_STDS, strict=True):
        for num_steps, style in zip(sorted({row["num_steps"] for row in rows}), ("-", "--"), strict=False):
            for sampling, color in zip(SAMPLINGS, ("tab:blue", "tab:orange"), strict=True):
                curve = [row for row in rows if (row["noise_std"], row["num_steps"]) == (std, num_steps)]
                # Both samplings begin at S = 1, which is measured once.
                curve = [row for row in curve if row["sampling"] == sampling or row["num_samples"] == 1]
                label = f"{sampling}, after {num_steps} steps"
                values = [row["noise_variance_times_flops"] for row in curve]
                axis.plot([row["num_samples"] for row in curve], values, style, color=color, marker="o", label=label)
        axis.axhline(1, color="grey", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        axis.set(title=f"noise std {std}", xlabel="S")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("noise variance x FLOPs, over S = 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    print(f"Drawn in {path}")


if __name__ == "__main__":
    main()
