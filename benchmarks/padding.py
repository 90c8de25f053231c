"""What padding costs: a training step on GSM8K's lengths with padded, length-sorted and padding-free batches.

    python benchmarks/padding.py                 # table and benchmarks/results/padding-<device>.json

All kinds hold the same problems, in `NUM_BATCHES` batches of 16: in their order and padded (the recipe's default),
sorted by length and padded (`training.train_sampling_strategy: group_by_length`), or padding-free, with all problems
of a batch in one row (the recipe's default with flash attention, which is used here if it is installed). A step is the
forward and backward pass of `dip_loss` at S = 1 on the 260K-parameter Llama of stories. Not run on a GPU yet.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, set_seed
from transformers.utils import is_flash_attn_2_available

if not __package__:  # run as a script: Python put benchmarks/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.measure import format_ratio, summarize, time_round, write_results
from dipnet_hf import DipConfig, dip_loss, get_dip_model
from recipes.config import load_config
from recipes.data import make_collator, prepare_data
from recipes.packing import PaddingFreeCollator
from recipes.running import load_tokenizer

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "stories260k-gsm8k-300.yaml"
BATCH_SIZE = 16
NUM_BATCHES = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as finetune.py's")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)

    config = load_config(CONFIG, args.set)
    if is_flash_attn_2_available():
        config.attn_implementation = "flash_attention_2"
    tokenizer = load_tokenizer(config)
    rows = prepare_data(config, tokenizer).train
    rows = list(rows)[: NUM_BATCHES * BATCH_SIZE]
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = {
        "padded": collate(rows, make_collator(tokenizer)),
        "sorted": collate(by_length, make_collator(tokenizer)),
        "padding-free": collate(rows, PaddingFreeCollator()),
    }

    set_seed(0)
    dtype = torch.bfloat16 if config.attn_implementation else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        config.model, dtype=dtype, attn_implementation=config.attn_implementation
    ).to(DEVICE)
    model = get_dip_model(base, DipConfig(weights="full", init_noise_std=0.05), calibration=batches["padded"]).train()
    sides = {name: (lambda of_side=of_side: train(model, of_side)) for name, of_side in batches.items()}
    time_round(sides, 0)
    rounds = [time_round(sides, number) for number in tqdm(range(args.rounds), desc="rounds")]
    results = [
        {
            "batches": name,
            "num_tokens": sum(batch["input_ids"].numel() for batch in of_side),
            **summarize("time_over_padded", [seconds[name] / seconds["padded"] for seconds in rounds]),
            "num_rounds": args.rounds,
        }
        for name, of_side in batches.items()
    ]
    print_table(results)
    settings = {"batch_size": BATCH_SIZE, "num_batches": NUM_BATCHES, "attention": base.config._attn_implementation}
    write_results(__file__, settings, rows=results)


def collate(rows: list[dict], collator) -> list[dict]:
    """Batches of these rows, in their order, on the device."""
    batches = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collator(rows[start : start + BATCH_SIZE])
        batches.append({name: value.to(DEVICE) if hasattr(value, "to") else value for name, value in batch.items()})
    return batches


def train(model, batches: list[dict]) -> None:
    """Run the forward and backward pass on every batch."""
    for batch in batches:
        dip_loss(model, batch).loss.backward()
        model.zero_grad()


def print_table(rows: list[dict]) -> None:
    """Print one line per kind of batch."""
    print(f"{'batches':<13} {'tokens':>7}  time over padded (quartiles)")
    for row in rows:
        print(f"{row['batches']:<13} {row['num_tokens']:>7}  {format_ratio(row, 'time_over_padded')}")


if __name__ == "__main__":
    main()
