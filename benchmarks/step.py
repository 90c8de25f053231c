"""What a DIPNet training step costs: time and peak memory against what a user would run instead.

    python benchmarks/step.py                    # all rows, table and benchmarks/results/step-<device>.json
    python benchmarks/step.py --hidden 256 --rounds 3

A step is forward, backward and optimizer inside a trainer, on one batch of random tokens whose first half is a prompt
without labels. The two trainers of a row take turns in one process, so that other load on the machine hits both; a row
gives the median and the quartiles of the rounds' ratios. Peak memory includes the model and the optimizer's state. On
a CPU it is the median of three processes per trainer, which differ by a few percent. Liger runs on a GPU if it is
installed. Absolute times are meaningful only on a GPU. Not run on a GPU yet.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

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
from dipnet_hf import DipConfig, DipSFTTrainer, DipTrainer, get_dip_model


class Side(NamedTuple):
    """One way to train. `num_samples` is S of eq. (2), or 0 without DIPNet."""

    trainer: type[Trainer]
    num_samples: int = 0
    upper: bool = False  # the upper half of the layers is projected, not all
    stability: bool = False  # eq. (4) on the logits
    liger: bool = False


SIDES = {
    "Trainer": Side(Trainer),
    "SFT": Side(SFTTrainer),
    "S=1": Side(DipTrainer, 1),
    "S=1 SFT": Side(DipSFTTrainer, 1),
    "S=2": Side(DipTrainer, 2),
    "S=4": Side(DipTrainer, 4),
    "S=4 SFT": Side(DipSFTTrainer, 4),
    "S=4 upper half": Side(DipTrainer, 4, upper=True),
    "S=4 stability on logits": Side(DipTrainer, 4, stability=True),
}
RATIOS = [
    ("S=1 SFT", "SFT"),
    ("S=1", "Trainer"),
    ("S=1 SFT", "Trainer"),
    ("S=2", "S=1"),
    ("S=4", "S=1"),
    ("S=4 SFT", "S=1 SFT"),
    ("S=4 upper half", "S=1"),
    ("S=4 stability on logits", "S=4"),
]
if torch.cuda.is_available():
    DEVICE, DTYPE = "cuda", torch.bfloat16
    NUM_LAYERS, VOCAB_SIZE, BATCH_SIZE, LENGTH, HIDDEN_SIZES = 16, 32_000, 4, 1024, [2048]
else:
    DEVICE, DTYPE = "cpu", torch.float32
    NUM_LAYERS, VOCAB_SIZE, BATCH_SIZE, LENGTH, HIDDEN_SIZES = 4, 8192, 2, 128, [1024]
if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
    SIDES |= {"Trainer Liger": Side(Trainer, liger=True), "S=1 Liger": Side(DipTrainer, 1, liger=True)}
    RATIOS += [("S=1 Liger", "Trainer Liger"), ("S=1", "Trainer Liger")]
MEMORY_STEPS = 3
NUM_MEMORY_PROCESSES = 1 if torch.cuda.is_available() else 3


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--weights", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds per row")
    parser.add_argument("--memory-of", nargs=3, metavar=("HIDDEN", "WEIGHTS", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        hidden, weights, side = args.memory_of
        print(peak_memory(lambda: train(int(hidden), weights, SIDES[side])))
        return

    rows = []
    for hidden, weights in tqdm([(h, w) for h in args.hidden for w in args.weights], desc="models"):
        memory = {}
        for side in SIDES:
            peaks = [memory_in_own_process(__file__, hidden, weights, side) for _ in range(NUM_MEMORY_PROCESSES)]
            memory[side] = statistics.median(peaks)
        for name, peer in tqdm(RATIOS, desc="rows", leave=False):
            rounds = measure_time(hidden, weights, [name, peer], args.rounds)
            rows.append(
                {
                    "hidden": hidden,
                    "weights": weights,
                    "side": name,
                    "peer": peer,
                    **summarize("time_ratio", [seconds[name] / seconds[peer] for seconds in rounds]),
                    "num_rounds": args.rounds,
                    "memory_ratio": memory[name] / memory[peer],
                    "peer_peak_mib": memory[peer] / 2**20,
                    "peer_seconds": sorted(seconds[peer] for seconds in rounds)[args.rounds // 2],
                }
            )
    print_table(rows)
    config = {"num_layers": NUM_LAYERS, "vocab_size": VOCAB_SIZE, "batch_size": BATCH_SIZE, "length": LENGTH}
    write_results(__file__, config, rows=rows)


def build(hidden: int, weights: str, side: Side) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """Build a trainer and its batch."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        use_cache=False,
    )
    with torch.device(DEVICE):  # a CPU would take longer to draw the weights than a GPU to train on them
        model = LlamaForCausalLM(config).to(DTYPE)
    if side.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=side.num_samples == 0)
    batch = {"input_ids": torch.randint(3, VOCAB_SIZE, (BATCH_SIZE, LENGTH), device=model.device)}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"].clone()}
    batch["labels"][:, : LENGTH // 2] = -100
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if weights == "lora" else "full"
    if side.num_samples:
        dip_config = DipConfig(
            weights=adapter,
            init_noise_std=0.05,  # as a number: a model with random weights has no level to find
            num_samples=side.num_samples,
            layers_to_transform=list(range(NUM_LAYERS // 2, NUM_LAYERS)) if side.upper else None,
            stability_loss_weight=0.1 if side.stability else 0.0,
            stability_target="logits",
        )
        model = get_dip_model(model, dip_config, calibration=[batch])
    elif weights == "lora":
        model = get_peft_model(model, adapter)
    trainer = make_trainer(model, side.trainer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, batch


def make_trainer(model, trainer_class: type[Trainer]) -> Trainer:
    """Make a trainer that is given its batches by hand; TRL's wants a tokenizer and data nevertheless."""
    arguments = {"output_dir": "runs/benchmark", "report_to": [], "disable_tqdm": True}
    if not issubclass(trainer_class, SFTTrainer):
        return trainer_class(model, TrainingArguments(**arguments))
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    config = SFTConfig(**arguments, bf16=False, gradient_checkpointing=False)
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    return trainer_class(model, config, train_dataset=rows, processing_class=tokenizer)


def step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> None:
    """One training step."""
    num_items = (batch["labels"][:, 1:] != -100).sum()
    trainer.training_step(trainer.model, dict(batch), num_items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def measure_time(hidden: int, weights: str, names: list[str], num_rounds: int) -> list[dict[str, float]]:
    """The seconds of a step of each of these sides, in every round."""
    gc.collect()  # the trainers of the row before are in reference cycles
    built = {name: build(hidden, weights, SIDES[name]) for name in names}
    sides = {name: (lambda both=both: step(*both)) for name, both in built.items()}
    for warmup in range(2):
        time_round(sides, warmup)
    return [time_round(sides, number) for number in range(num_rounds)]


def train(hidden: int, weights: str, side: Side) -> None:
    """The steps whose peak memory is measured, model and optimizer state included."""
    trainer, batch = build(hidden, weights, side)
    for _ in range(MEMORY_STEPS):
        step(trainer, batch)


def print_table(rows: list[dict]) -> None:
    """Print one line per ratio."""
    print(f"{'hidden':>7} {'weights':>8}  {'step of':<24} over that of   time (quartiles)       peak memory")
    for row in rows:
        print(
            f"{row['hidden']:>7} {row['weights']:>8}  {row['side']:<24} {row['peer']:<13} "
            f"{format_ratio(row, 'time_ratio'):<22} {row['memory_ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
