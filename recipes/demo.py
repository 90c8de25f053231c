"""From data to results in one command: fine-tune a tiny Llama with and without DIPNet, score both, compare.

    make demo        # or: python recipes/demo.py

A base learns one-step word problems. From it, for each seed, a plain run and a DIPNet run learn two- and three-step
ones: same data, same order, same steps. Both are scored with lm-evaluation-harness on held-out problems and on three
harder kinds, DIPNet with its noise off and as the mean of 8 noisy passes. Nothing is downloaded. The folder runs/demo
is made anew; at the end it holds `results.json`, the loss curves, the learned noise, and one folder per run.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes import finetune
from recipes.data import make_collator
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.tokens import format_prompt, tokenize
from recipes.word_problems import generate_splits
from report import format_spreads, plot_losses, plot_noise, provenance

FOLDER = Path("runs/demo")
CONFIG = "recipes/configs/word-problems.yaml"
SIZES = {
    "pretrain": 12_000,
    "train": 2_000,
    "test": 300,
    "test_more_steps": 100,
    "test_larger_numbers": 100,
    "test_unseen_templates": 100,
}
METHODS = {"plain": ["dip=null"], "DIPNet": ["evaluation.num_samples=8"]}
ENSEMBLE = "DIPNet, mean of 8"
SEEDS = (0, 1, 2)
METRICS = {
    "Exact match": "exact_match,strict-match",
    "NLL per token, nats": "eval_nll",
    "ECE of the answers": "ece,strict-match",
}
BASE_TRAINING: dict[str, Any] = {
    "max_steps": 800,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 40,
    "adam_beta2": 0.99,
}


def main() -> None:
    """Run the demo from the data to the table."""
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    splits = generate_splits(seed=0, sizes=SIZES)
    write_data(splits)
    train_base(splits)
    runs = {}
    for method, settings in METHODS.items():
        runs[method] = [run(method, settings, seed) for seed in SEEDS]
    compare(runs)


def write_data(splits: dict[str, list[dict]]) -> None:
    """Write the data set of the recipe, and the harder problems beside it."""
    paths = {"train": "data/train.jsonl", "test": "data/test.jsonl"}
    paths |= {name: f"harder/{name.removeprefix('test_')}.jsonl" for name in splits if name.startswith("test_")}
    for split, path in paths.items():
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(problem) + "\n" for problem in splits[split]]
        (FOLDER / path).write_text("".join(lines), encoding="utf-8")


def train_base(splits: dict[str, list[dict]]) -> None:
    """Train the tokenizer and the base model that both methods start from."""
    texts = [f"{format_prompt(p['question'])} {p['answer']}" for p in splits["pretrain"] + splits["train"]]
    tokenizer = train_tokenizer(texts, vocab_size=512)
    set_seed(0)
    model = tiny_llama(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "base"),
        seed=0,
        data_seed=0,
        logging_steps=50,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        **BASE_TRAINING,
    )
    train_set = tokenize(Dataset.from_list(splits["pretrain"]), tokenizer)
    Trainer(model, arguments, make_collator(tokenizer), train_set, processing_class=tokenizer).train()
    model.save_pretrained(FOLDER / "base")
    tokenizer.save_pretrained(FOLDER / "base")


def run(method: str, settings: list[str], seed: int) -> str:
    """Fine-tune and score once; return the path of the run's result file."""
    folder = FOLDER / f"{method}-{seed}"
    print(f"\n{method}, seed {seed}")
    finetune.main([CONFIG, "--set", f"training.output_dir={folder}", f"training.seed={seed}", *settings])
    return str(folder / "results.json")


def compare(runs: dict[str, list[str]]) -> None:
    """Write the result file and the pictures, and print the table."""
    results = {method: [json.loads(Path(path).read_text()) for path in paths] for method, paths in runs.items()}
    rows = []
    for method, seeds in results.items():
        for label, kind in ((method, "scores"), (ENSEMBLE, "ensemble_scores")):
            for seed, result in zip(SEEDS, seeds, strict=True):
                scores = result[kind] or {}  # a plain run has no ensemble
                rows += [{"method": label, "seed": seed, "task": task, **numbers} for task, numbers in scores.items()]
    config = {"sizes": SIZES, "base_training": BASE_TRAINING, "run": results["DIPNet"][0]["provenance"]["config"]}
    document = {"provenance": provenance(__file__, config), "rows": rows}
    (FOLDER / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot_losses([paths[0] for paths in runs.values()], str(FOLDER / "losses.png"))
    plot_noise(runs["DIPNet"][0], str(FOLDER / "noise.png"), sort_channels=True)
    for title, metric in METRICS.items():
        values: dict[str, dict[str, list[float]]] = {}
        for row in rows:
            by_task = values.setdefault(row["method"], {})
            by_task.setdefault(row["task"].removeprefix("word_problems_"), []).append(row[metric])
        print(f"\n{title}, mean +- standard deviation over {len(SEEDS)} seeds\n")
        print(format_spreads(values))
    print(f"\nresults.json, losses.png, noise.png and the runs are in {FOLDER}")


if __name__ == "__main__":
    main()
