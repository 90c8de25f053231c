"""What the loss costs at the output head: time and peak memory against whole logits and TRL's fused head.

    python benchmarks/loss.py                    # all rows, table and benchmarks/results/loss-<device>.json

Forward and backward pass from the hidden states of N supervised tokens in S samples, for a trained and a frozen head.
The naive loss computes the logits of all tokens, and transformers' cross entropy. TRL's loss is its chunked
log-probabilities, which cannot give eq. (4) on logits; Liger's, on a GPU where it is installed, its fused cross
entropy. Times are measured in turns in one process; peak memory in one process per case, above what the inputs hold.
Not run on a GPU yet.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from trl.kernels import ChunkedLogProbFunction

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
from dipnet_hf.chunked_loss import OutputHead, chunked_loss
from dipnet_hf.objective import stability_penalty

if torch.cuda.is_available():
    DEVICE, DTYPE, HIDDEN_SIZE, NUM_TOKENS, VOCAB_SIZES = "cuda", torch.bfloat16, 2048, 4096, [32_000, 152_000]
else:
    DEVICE, DTYPE, HIDDEN_SIZE, NUM_TOKENS, VOCAB_SIZES = "cpu", torch.float32, 512, 1024, [8192, 32_000]
STABILITY_WEIGHT = 0.1
TRL_CHUNK_SIZE = 32_768  # entries of the vocabulary per tile, as in TRL's trainers

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the table and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCAB_SIZES)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=4, metavar=("VOCAB", "S", "HEAD", "LOSS"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_of:
        vocab, samples, head, loss = args.memory_of
        print(peak_memory(step_of(int(vocab), int(samples), head, loss)))
        return

    cases = [(v, s, head) for v in args.vocab for s in args.samples for head in ("trained", "frozen")]
    rows = []
    for vocab, samples, head in tqdm(cases, desc="cases"):
        names = [name for name in LOSSES if samples > 1 or "logits" not in name]
        sides = {name: step_of(vocab, samples, head, name) for name in names}
        time_round(sides, 0)
        rounds = [time_round(sides, number) for number in range(args.rounds)]
        memory = {name: memory_in_own_process(__file__, vocab, samples, head, name) for name in names}
        for name in names:
            peer = "naive, stability on logits" if "logits" in name else "naive"
            rows.append(
                {
                    "vocab_size": vocab,
                    "num_samples": samples,
                    "head": head,
                    "loss": name,
                    **summarize("time_over_naive", [seconds[name] / seconds[peer] for seconds in rounds]),
                    "memory_over_naive": memory[name] / memory[peer],
                    "peak_mib": memory[name] / 2**20,
                    "num_rounds": args.rounds,
                }
            )
    print_table(rows)
    config = {"hidden_size": HIDDEN_SIZE, "num_tokens": NUM_TOKENS, "dtype": str(DTYPE)}
    write_results(__file__, config, rows=rows)


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (2) in chunks."""
    return chunked_loss(hidden, targets, OutputHead(weight, None, DTYPE), num_samples).total


def ours_stable(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eqs. (2) and (4), on logits, in chunks."""
    head = OutputHead(weight, None, DTYPE)
    return chunked_loss(hidden, targets, head, num_samples, STABILITY_WEIGHT, "logits").total


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (2) from all logits, in float32 as transformers does."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum") / num_samples


def naive_stable(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eqs. (2) and (4), on logits, from all logits."""
    logits = F.linear(hidden, weight)
    nll = F.cross_entropy(logits.float(), targets, reduction="sum") / num_samples
    return nll + STABILITY_WEIGHT * stability_penalty(logits, num_samples)


def trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (2) from TRL's fused head."""
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, TRL_CHUNK_SIZE, None, 1.0, ("log_probs",)
    )
    return -log_probs.sum() / num_samples


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (2) from Liger's fused linear cross entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight, hidden, targets) / num_samples


LOSSES: dict[str, Loss] = {
    "naive": naive,
    "ours": ours,
    "TRL": trl,
    "naive, stability on logits": naive_stable,
    "ours, stability on logits": ours_stable,
}
if DEVICE == "cuda" and importlib.util.find_spec("liger_kernel"):
    LOSSES["Liger"] = liger


def step_of(vocab_size: int, num_samples: int, head: str, loss: str) -> Callable[[], None]:
    """A function that runs the forward and backward pass of a loss, on inputs that are made here."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    hidden = torch.randn(num_samples * NUM_TOKENS, HIDDEN_SIZE, generator=generator, device=DEVICE).to(DTYPE)
    weight = torch.randn(vocab_size, HIDDEN_SIZE, generator=generator, device=DEVICE).div_(HIDDEN_SIZE**0.5).to(DTYPE)
    targets = torch.randint(vocab_size, (NUM_TOKENS,), generator=generator, device=DEVICE).repeat(num_samples)
    hidden.requires_grad_()
    weight.requires_grad_(head == "trained")

    def step() -> None:
        hidden.grad = weight.grad = None
        LOSSES[loss](hidden, weight, targets, num_samples).backward()

    return step


def print_table(rows: list[dict]) -> None:
    """Print one line per case."""
    print(f"{'V':>7} {'S':>2} {'head':>8}  {'loss':<27} time over naive (quartiles)  memory over naive  peak MiB")
    for row in rows:
        print(
            f"{row['vocab_size']:>7} {row['num_samples']:>2} {row['head']:>8}  {row['loss']:<27} "
            f"{format_ratio(row, 'time_over_naive'):<27} {row['memory_over_naive']:>17.3f} {row['peak_mib']:>9.0f}"
        )


if __name__ == "__main__":
    main()
