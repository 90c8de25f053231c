"""How near is what `--plan` says of a training step's peak memory to what a process measures?

    python benchmarks/plan.py                    # all rows, table and benchmarks/results/plan-cpu.json

Real models, in `runs/models`, by the configurations of `recipes/configs/`, in batches of 4 x 128 random tokens, the
last of which is padded. The measured peak is the resident memory that two steps of the trainer add to a process of its
own, the loaded model included, but not what loading takes: the peak is forgotten before the first step. Memory
that is freed is given back at once (`MALLOC_MMAP_THRESHOLD_`), or else glibc keeps some of it. For a CPU.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm
from transformers import Trainer, set_seed

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import memory_in_own_process, resident_bytes, write_results
from dipnet_hf import DipTrainer
from recipes.config import FinetuneConfig, load_config
from recipes.finetune import wrap_model
from recipes.footprint import build_network, measure
from recipes.running import load_base

CONFIGS = ["smollm2-gsm8k", "gemma3-270m-gsm8k"]
LORA = "{peft_type: LORA, r: 16, target_modules: all-linear}"
SIDES = {"plain": "null", "S=1": "{noise_scale: absolute, init_noise_std: 0.01}"}
SIDES["S=2"] = SIDES["S=1"].replace("}", ", num_samples: 2}")
CASES = [
    ("lora", "plain", "kept"),
    ("lora", "S=1", "kept"),
    ("lora", "S=1", "recomputed"),
    ("lora", "S=2", "kept"),
    ("full", "S=1", "kept"),
    ("full", "S=2", "recomputed"),
]
BATCH_SIZE, LENGTH, NUM_STEPS = 4, 128, 2


def main(arguments: list[str] | None = None) -> None:
    """Plan and measure every case, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        print(measured_peak(configure(*args.memory_of)))
        return
    rows = []
    for name, case in tqdm(list(product(args.configs, CASES)), desc="cases"):
        config = configure(name, *case)
        planned = measure(config, config.training_arguments(), for_gpu=False)
        with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
            measured = memory_in_own_process(__file__, name, *case)
        row = dict(zip(("weights", "side", "activations"), case, strict=True))
        rows.append({"config": name, **row, "planned": sum(planned.peak.values()), "measured": measured})
        print_row(rows[-1])
    write_results(__file__, {"batch_size": BATCH_SIZE, "length": LENGTH, "num_steps": NUM_STEPS}, rows=rows)


def configure(name: str, weights: str, side: str, activations: str) -> FinetuneConfig:
    """The configuration of a case."""
    overrides = {
        "max_length": LENGTH,
        "weights": LORA if weights == "lora" else "full",
        "dip": SIDES[side],
        "evaluation.tasks": "[]",
        "evaluation.num_samples": "null",
        "training.output_dir": "runs/benchmark",
        "training.per_device_train_batch_size": BATCH_SIZE,
        "training.per_device_eval_batch_size": 1,
        "training.report_to": "[]",
        "training.use_cpu": "true",
        "training.activation_checkpointing": "true" if activations == "recomputed" else "false",
    }
    return load_config(f"recipes/configs/{name}.yaml", [f"{key}={value}" for key, value in overrides.items()])


def measured_peak(config: FinetuneConfig) -> int:
    """Train for a few steps in this process; return the bytes of the peak above what it held before."""
    build_network(config)  # for the modules that it imports
    before = resident_bytes("VmRSS")
    set_seed(0)
    trainer = (Trainer if config.dip is None else DipTrainer)(
        wrap_model(load_base(config), config), config.training_arguments()
    )
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    batch = make_batch(trainer.model.config.get_text_config().vocab_size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    for _ in range(NUM_STEPS):
        trainer.training_step(trainer.model, dict(batch), torch.tensor(BATCH_SIZE * (LENGTH - 1)))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    return resident_bytes("VmHWM") - before


def make_batch(vocab_size: int) -> dict[str, torch.Tensor]:
    """Random tokens, all of them learned but the last one, which is padding."""
    batch = {"input_ids": torch.randint(3, vocab_size, (BATCH_SIZE, LENGTH))}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    batch["attention_mask"][0, -1], batch["labels"][0, -1] = 0, -100
    return batch


def print_row(row: dict) -> None:
    """Print one line of the table."""
    planned, measured = row["planned"] / 2**20, row["measured"] / 2**20
    case = f"{row['config']:<18} {row['weights']:<5} {row['side']:<6} activations {row['activations']:<10}"
    tqdm.write(f"{case} planned {planned:7,.0f} MiB  measured {measured:7,.0f} MiB  ratio {planned / measured:.3f}")


if __name__ == "__main__":
    main()
