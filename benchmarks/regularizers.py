"""What each regularizer costs: time and peak memory of a training step over those of plain fine-tuning.

    python benchmarks/regularizers.py            # table and benchmarks/results/regularizers-<device>.json
    python benchmarks/regularizers.py --hidden 256 --rounds 3 --methods sam r_drop

A step is forward, backward and optimizer inside `Trainer`, on one batch of random tokens whose first half
is a prompt without labels, by each method's default settings. All methods and DIPNet (S = 1) take turns with the plain
step in one process; a row gives the median and the quartiles of the rounds' ratios. Peak memory is that of a process
of its own, model and optimizer state included.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from peft import LoraConfig, MontecloraConfig, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import (
    format_ratio,
    memory_in_own_process,
    peak_memory,
    summarize,
    time_round,
    write_results,
)
from dipnet_hf import DipConfig, DipTrainer, get_dip_model
from dipnet_hf.regularizers import METHODS, regularize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_LAYERS, VOCAB_SIZE, BATCH_SIZE, LENGTH = 4, 8192, 2, 128
MEMORY_STEPS = 3
DROPOUT = 0.05  # without which nothing differs between the two passes of R-Drop; the plain step's too


def main(arguments: list[str] | None = None) -> None:
    """Measure every method, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--memory-of", nargs=3, metavar=("HIDDEN", "WEIGHTS", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        hidden, weights, name = args.memory_of
        print(peak_memory(lambda: train(int(hidden), weights, name)))
        return

    rows = []
    for weights in args.weights:
        names = ["plain", "dip", *(name for name in args.methods if weights == "lora" or not METHODS[name].needs_lora)]
        memory = {
            name: memory_in_own_process(__file__, args.hidden, weights, name)
            for name in tqdm(names, desc=f"memory, {weights}")
        }
        rounds = measure_time(args.hidden, weights, names, args.rounds)
        for name in names[1:]:
            rows.append(
                {
                    "weights": weights,
                    "method": name,
                    **summarize("time_ratio", [seconds[name] / seconds["plain"] for seconds in rounds]),
                    "memory_ratio": memory[name] / memory["plain"],
                }
            )
    print_table(rows)
    config = {
        **{"num_layers": NUM_LAYERS, "vocab_size": VOCAB_SIZE, "batch_size": BATCH_SIZE, "length": LENGTH},
        **{"hidden": args.hidden, "rounds": args.rounds, "dropout": DROPOUT},
    }
    write_results(__file__, config, rows=rows)


def build(hidden: int, weights: str, name: str) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """Build a trainer with a method, and its batch."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        attention_dropout=DROPOUT,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config)
    batch = {"input_ids": torch.randint(3, VOCAB_SIZE, (BATCH_SIZE, LENGTH), device=model.device)}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    batch["labels"][:, : LENGTH // 2] = -100
    lora = LoraConfig(
        r=16,
        lora_dropout=DROPOUT,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        monteclora_config=MontecloraConfig(num_samples=8, buffer_size=1) if name == "monteclora" else None,
    )
    if name == "dip":
        dip_config = DipConfig(weights=lora if weights == "lora" else "full", init_noise_std=0.05)
        model = get_dip_model(model, dip_config, calibration=[batch])
    elif weights == "lora":
        model = get_peft_model(model, lora)
    arguments = TrainingArguments("runs/benchmark", report_to=[], disable_tqdm=True)
    trainer = (DipTrainer if name == "dip" else Trainer)(model, arguments)
    if name in METHODS:
        regularize(trainer, METHODS[name]())
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, batch


def step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> None:
    """One training step."""
    num_items = (batch["labels"][:, 1:] != -100).sum()
    trainer.training_step(trainer.model, dict(batch), num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def measure_time(hidden: int, weights: str, names: list[str], num_rounds: int) -> list[dict[str, float]]:
    """The seconds of a step of each method and of the plain step beside it, in every round."""
    built = {name: build(hidden, weights, name) for name in names}
    gc.collect()
    sides = {name: (lambda both=both: step(*both)) for name, both in built.items()}
    for warmup in range(2):
        time_round(sides, warmup)
    return [time_round(sides, number) for number in tqdm(range(num_rounds), desc=f"rounds, {weights}")]


def train(hidden: int, weights: str, name: str) -> None:
    """The steps whose peak memory is measured, model and optimizer state included."""
    trainer, batch = build(hidden, weights, name)
    for _ in range(MEMORY_STEPS):
        step(trainer, batch)


def print_table(rows: list[dict]) -> None:
    """Print one line per method and kind of weights."""
    print(f"{'weights':>8}  {'method':<22} time over plain        memory over plain")
    for row in rows:
        print(
            f"{row['weights']:>8}  {row['method']:<22} {format_ratio(row, 'time_ratio'):<22} {row['memory_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
