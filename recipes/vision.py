"""The paper's other half on a small scale: MLP, ResNet and ViT on real digits, with DIPNet and with comparators.

    python -m recipes.vision runs/vision --seeds 5
    python -m recipes.vision runs/vision --models vit --methods plain dip sam

Every method has one setting, of which three values are tried on the validation images with seed 0. With the best one
it is trained with each seed, and scored on the test images: clean, with noise, shifted, rotated, pale, occluded, and
attacked by FGSM and PGD. A run that was stopped goes on. The folder receives `vision.json` and `vision.md`.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import ImageClassifierOutput

from dipnet_hf import DipConfig, DipTrainer, get_dip_model
from dipnet_hf.regularizers import SAM, Regularizer, SpectralNorm, regularize
from recipes.images import IMAGE_SIZE, NUM_CLASSES, SHIFTS, as_rows, cut_out, load_splits
from report import provenance
from report.output_folder import write_whole

LABELS: dict[str, Any] = {"num_labels": NUM_CLASSES}
TRAINING: dict[str, Any] = {
    "num_train_epochs": 60,
    "per_device_train_batch_size": 50,
    "learning_rate": 3e-3,
    "warmup_steps": 40,
}
NUM_SAMPLES = 8
ATTACK_RADIUS, PGD_STEPS = 0.1, 10


# ---- models ----


class MLP(nn.Module):
    """Three hidden layers of 128, each with a normalization."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [IMAGE_SIZE**2, 128, 128, 128]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.ReLU())
            for size, width in zip(sizes, sizes[1:], strict=False)
        )
        self.classifier = nn.Linear(sizes[-1], NUM_CLASSES)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits of shape `(B, 10)`, and with labels their cross-entropy."""
        hidden = pixel_values.flatten(1)
        for layer in self.layers:
            hidden = layer(hidden)
        logits = self.classifier(hidden)
        loss: Any = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_resnet() -> nn.Module:
    """A ResNet of two stages."""
    sizes: dict[str, Any] = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
    config = ResNetConfig(layer_type="basic", **sizes, **LABELS)
    return ResNetForImageClassification(config)


def make_vit() -> nn.Module:
    """A ViT of four layers on patches of 4 x 4 pixels."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "image_size": IMAGE_SIZE, "num_channels": 1}
    config = ViTConfig(num_hidden_layers=4, num_attention_heads=4, patch_size=4, **sizes, **LABELS)
    return ViTForImageClassification(config)


class Network(NamedTuple):
    """A network, and its modules that noise enters."""

    make: Callable[[], nn.Module]
    layers: str  # their inputs are what the paper projects
    first: str  # its input is the image


NETWORKS = {
    "mlp": Network(MLP, r".*layers\.\d", "layers.0"),
    "resnet": Network(make_resnet, r".*stages\.\d\.layers\.\d", "resnet.embedder"),
    "vit": Network(make_vit, r".*vit\.layers\.\d", "vit.embeddings.patch_embeddings"),
}


# ---- methods ----


class Method(NamedTuple):
    """One way to train, with the values of its setting that are tried."""

    values: tuple[float, ...]
    noise: Callable[[Network, float], DipConfig] | None = None
    regularizer: Callable[[float], Regularizer] | None = None
    setting: str = ""  # of the training arguments
    cuts_out: bool = False


def layer_noise(network: Network, std: float) -> DipConfig:
    """The paper's: absolute variances, one per channel, that learn."""
    return DipConfig(weights="full", target_modules=network.layers, noise_scale="absolute", init_noise_std=std)


def input_noise(network: Network, std: float) -> DipConfig:
    """Randomized smoothing: fixed noise on the pixels alone."""
    fixed: dict[str, Any] = {"logvar_learning_rate": 0.0, "prior_weight": 0.0}
    return DipConfig(
        weights="full", target_modules=[network.first], noise_scale="absolute", init_noise_std=std, **fixed
    )


METHODS = {
    "plain": Method((0.0, 0.1, 1.0), setting="weight_decay"),
    "dip": Method((0.1, 0.3, 1.0), noise=layer_noise),
    "randomized_smoothing": Method((0.1, 0.2, 0.4), noise=input_noise),
    "sam": Method((0.02, 0.1, 0.5), regularizer=SAM),
    "spectral_norm": Method((0.001, 0.01, 0.1), regularizer=SpectralNorm),
    "cutout": Method((4, 6, 8), cuts_out=True),
}


class CutOut:
    """A collator that blanks a square of each training image."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch."""
        batch = default_data_collator(rows)
        return {**batch, "pixel_values": cut_out(batch["pixel_values"], self.size)}


def train(network: Network, method: Method, value: float, seed: int, images: list, folder: Path) -> nn.Module:
    """Train a network from scratch.

    Args:
        images (`list[dict]`): the training images.
        folder (`Path`): the trainer's, which nothing is written to.
    """
    set_seed(seed)
    model = network.make()
    if method.noise is not None:
        model = get_dip_model(model, method.noise(network, value))
    arguments = TRAINING | ({method.setting: value} if method.setting else {})
    training_args = TrainingArguments(
        str(folder), seed=seed, data_seed=seed, use_cpu=not torch.cuda.is_available(), report_to=[],
        save_strategy="no", lr_scheduler_type="cosine", disable_tqdm=True, logging_strategy="no", **arguments,
    )  # fmt: skip
    trainer = (Trainer if method.noise is None else DipTrainer)(
        model, training_args, train_dataset=images,
        data_collator=CutOut(int(value)) if method.cuts_out else default_data_collator,
    )  # fmt: skip
    if method.regularizer is not None:
        regularize(trainer, method.regularizer(value))
    trainer.train()
    return model.eval()


# ---- scores ----


def attack(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, num_steps: int) -> torch.Tensor:
    """Move every pixel by at most `ATTACK_RADIUS` against the noise-free network, and keep it between 0 and 1.

    One step is FGSM (Goodfellow et al. 2015), several are PGD (Madry et al. 2018), from the image itself.
    """
    step = ATTACK_RADIUS if num_steps == 1 else 2.5 * ATTACK_RADIUS / num_steps
    moved = images
    for _ in range(num_steps):
        moved = moved.detach().requires_grad_()
        loss = functional.cross_entropy(model(pixel_values=moved).logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, moved)
        moved = (moved + step * gradient.sign()).clamp(images - ATTACK_RADIUS, images + ATTACK_RADIUS).clamp(0, 1)
    return moved.detach()


def measure(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy, and negative log-likelihood in nats."""
    with torch.no_grad():
        logits = model(pixel_values=images).logits.float()
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": accuracy, "nll": functional.cross_entropy(logits, labels).item()}


def score(model: Any, images: torch.Tensor, labels: torch.Tensor, num_samples: int = 1) -> dict[str, dict]:
    """Measure a network on the images as they are and as no one was trained on them.

    Args:
        num_samples (`int`): the mean of so many noisy passes answers; 1 is the noise-free network.
    """
    set_seed(0)  # the same changes for every network
    inputs = {name: change(images) for name, change in SHIFTS.items()}
    inputs |= {name: attack(model, images, labels, steps) for name, steps in (("fgsm", 1), ("pgd", PGD_STEPS))}
    with nullcontext() if num_samples == 1 else model.ensemble(num_samples):
        return {name: measure(model, values, labels) for name, values in inputs.items()}


# ---- the program ----


def run(output_dir: Path, models: Iterable[str], methods: Iterable[str], num_seeds: int) -> dict[str, Any]:
    """Fill `vision.json`, one row for each network, method and seed; rows that are there are kept."""
    path = output_dir / "vision.json"
    config = {"training": TRAINING, "samples": NUM_SAMPLES, "radius": ATTACK_RADIUS, "pgd_steps": PGD_STEPS}
    results = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    if results["rows"] and results["provenance"]["config"] != config:
        raise ValueError(f"{path} was made with {results['provenance']['config']}, this program has {config}.")
    splits = load_splits()
    train_set, test, validation = as_rows(splits["train"]), splits["test"], splits["validation"]
    for name in models:
        for method_name in methods:
            network, method = NETWORKS[name], METHODS[method_name]
            done = results["rows"].setdefault(f"{name} {method_name}", {"tried": {}, "seeds": {}})
            for value in method.values:
                if str(value) not in done["tried"]:
                    model = train(network, method, value, 0, train_set, output_dir)
                    done["tried"][str(value)] = measure(model, validation["pixel_values"], validation["labels"])
            done["value"] = min(method.values, key=lambda value: done["tried"][str(value)]["nll"])
            for seed in range(num_seeds):
                if str(seed) in done["seeds"]:
                    continue
                model = train(network, method, done["value"], seed, train_set, output_dir)
                samples = {"noise_off": 1} if method.noise is None else {"noise_off": 1, "mean": NUM_SAMPLES}
                done["seeds"][str(seed)] = {
                    answers: score(model, test["pixel_values"], test["labels"], number)
                    for answers, number in samples.items()
                }
                results["provenance"] = provenance(__file__, config, seed=num_seeds)
                write_whole(path, json.dumps(results, indent=1))
    return results


def make_table(results: dict[str, Any]) -> str:
    """A table of accuracies in percent, mean and deviation over the seeds, one line per network and method."""
    conditions = [*SHIFTS, "fgsm", "pgd"]
    lines = ["| network, method | setting | " + " | ".join(conditions) + " |", "|---" * (len(conditions) + 2) + "|"]
    for name, row in results["rows"].items():
        for answers in next(iter(row["seeds"].values()), {}):
            cells = []
            for condition in conditions:
                found = [100 * seed[answers][condition]["accuracy"] for seed in row["seeds"].values()]
                cells.append(f"{statistics.mean(found):.1f} ± {statistics.stdev(found) if len(found) > 1 else 0:.1f}")
            label = name if answers == "noise_off" else f"{name}, mean of {NUM_SAMPLES}"
            lines.append(f"| {label} | {row['value']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="folder of vision.json and vision.md")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    args = parser.parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    table = make_table(run(args.output_dir, args.models, args.methods, args.seeds))
    write_whole(args.output_dir / "vision.md", table)
    print(table)


if __name__ == "__main__":
    main()
