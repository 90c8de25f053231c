"""What answering by k samples costs: time and peak memory of an ensemble in generation and in scoring.

    python benchmarks/ensemble.py                # all rows, tables and benchmarks/results/ensemble-<device>.json
    python benchmarks/ensemble.py --hidden 256 --samples 1 8 --rounds 3

Generation is greedy, from one prompt of random tokens, and every side generates the same number of tokens: `plain` is
one call of the network without DIPNet, `separate` k calls of one sample each, `ensemble` one call of k samples.
Scoring is a forward pass of the prompts and options of multiple-choice questions, batch by batch, with the noise off
and inside an ensemble. A round times every side once, in rotating order and in one process, so that other load on the
machine hits all sides. A row gives the median and the quartiles of the rounds' ratios. Peak memory, model included, is
measured in one process per side. Absolute times are meaningful only on a GPU, where the network is larger and
bfloat16. Not run on a GPU yet.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

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
from dipnet_hf import DipConfig, get_dip_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN_SIZES, NUM_LAYERS, DTYPE = ([2048], 16, torch.bfloat16) if DEVICE == "cuda" else ([256, 512], 4, torch.float32)
VOCAB_SIZE = 8192
PROMPT_LENGTH, ANSWER_LENGTH = 128, 64
NUM_REQUESTS, REQUEST_LENGTH, BATCH_SIZE = 200, 96 + 8, 16  # prompt and option
TARGET_SAMPLES = 8  # k of the throughput target, of scoring and of the rows with half of the layers projected
ROUNDS_OF_ONE = 4  # rows of k = 1 get this many times the rounds: they are quick, with ratios near 1


def main(arguments: list[str] | None = None) -> None:
    """Measure every row, print the tables and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=6, help="timed rounds per row")
    parser.add_argument(
        "--memory-of", nargs=4, metavar=("WORK", "HIDDEN", "LAYERS", "SAMPLES"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(arguments)
    if args.memory_of:
        work, hidden, layers, samples = args.memory_of
        print(peak_memory(lambda: WORK[work](int(hidden), layers, int(samples))))
        return

    cases = [(hidden, "all", samples) for hidden in args.hidden for samples in args.samples]
    largest = max(args.hidden)
    if TARGET_SAMPLES in args.samples:
        cases.append((largest, "upper", TARGET_SAMPLES))
    memory = cache(partial(memory_in_own_process, __file__))
    rows = [generation_row(*case, args.rounds, memory) for case in tqdm(cases, desc="cases")]
    scoring = [scoring_row(largest, TARGET_SAMPLES, memory)] if TARGET_SAMPLES in args.samples else []
    targets = check_targets(rows, largest)
    print_tables(rows, scoring, targets)
    config = {
        "num_layers": NUM_LAYERS,
        "vocab_size": VOCAB_SIZE,
        "dtype": str(DTYPE).removeprefix("torch."),
        "prompt_length": PROMPT_LENGTH,
        "answer_length": ANSWER_LENGTH,
        "request_length": REQUEST_LENGTH,
        "batch_size": BATCH_SIZE,
        "average": "prob",
    }
    write_results(__file__, config, rows=rows, scoring=scoring, targets=targets)


# ---- the work ----


def build(hidden: int, layers: str) -> nn.Module:
    """Build a network in eval mode: without DIPNet (`"none"`), or with `"all"` or the `"upper"` half projected."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        pad_token_id=0,
    )
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(DTYPE)
    if layers != "none":
        projected = list(range(NUM_LAYERS // 2, NUM_LAYERS)) if layers == "upper" else None
        dip = DipConfig(weights="frozen", noise_scale="absolute", init_noise_std=0.05, layers_to_transform=projected)
        model = get_dip_model(model, dip)
    return model.eval()


def random_tokens(num_rows: int, length: int) -> dict[str, torch.Tensor]:
    """Model inputs without padding."""
    input_ids = torch.randint(3, VOCAB_SIZE, (num_rows, length), device=DEVICE)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def answer(model: nn.Module, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Generate the one answer to the prompt, greedily."""
    return model.generate(**prompt, do_sample=False, min_new_tokens=ANSWER_LENGTH, max_new_tokens=ANSWER_LENGTH)


def answer_by_ensemble(model: nn.Module, prompt: dict[str, torch.Tensor], samples: int, seed: int = 0) -> torch.Tensor:
    """Generate the answer of k samples in one call."""
    with model.ensemble(samples, seed=seed):
        return answer(model, prompt)


def answer_separately(model: nn.Module, prompt: dict[str, torch.Tensor], samples: int) -> list[torch.Tensor]:
    """Generate k answers of one sample each."""
    return [answer_by_ensemble(model, prompt, 1, seed) for seed in range(samples)]


@torch.no_grad()
def score(model: nn.Module, batch: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    """The logits of a batch of requests: those of the mean of k samples, or with the noise off if k is 0."""
    with model.ensemble(samples) if samples else model.deterministic():
        return model(**batch).logits


def generate_once(hidden: int, layers: str, samples: int) -> None:
    """The generation whose peak memory is measured; k calls one after the other have the peak of one."""
    model, prompt = build(hidden, layers), random_tokens(1, PROMPT_LENGTH)
    answer_by_ensemble(model, prompt, samples) if samples else answer(model, prompt)


def score_once(hidden: int, layers: str, samples: int) -> None:
    """The scoring of one batch, whose peak memory is measured."""
    score(build(hidden, layers), random_tokens(BATCH_SIZE, REQUEST_LENGTH), samples)


WORK: dict[str, Callable[[int, str, int], None]] = {"generate": generate_once, "score": score_once}


# ---- the rows ----


def generation_row(hidden: int, layers: str, samples: int, num_rounds: int, memory: Callable[..., int]) -> dict:
    """Compare the three sides in time, round by round, and in peak memory."""
    if samples == 1:
        num_rounds *= ROUNDS_OF_ONE
    rounds = time_generation(hidden, layers, samples, num_rounds)
    peaks = {
        "plain": memory("generate", hidden, "none", 0),
        "separate": memory("generate", hidden, layers, 1),
        "ensemble": memory("generate", hidden, layers, samples),
    }
    return {
        "hidden": hidden,
        "layers": layers,
        "num_samples": samples,
        **summarize("throughput_over_separate", [r["separate"] / r["ensemble"] for r in rounds]),
        **summarize("time_over_plain", [r["ensemble"] / r["plain"] for r in rounds]),
        "num_rounds": num_rounds,
        "tokens_per_second": {side: ANSWER_LENGTH / statistics.median(r[side] for r in rounds) for side in peaks},
        "memory_over_plain": peaks["ensemble"] / peaks["plain"],
        "memory_over_separate": peaks["ensemble"] / peaks["separate"],
        "plain_peak_mib": peaks["plain"] / 2**20,
    }


def time_generation(hidden: int, layers: str, samples: int, num_rounds: int) -> list[dict[str, float]]:
    """The seconds of each side in each round."""
    plain, dip = build(hidden, "none"), build(hidden, layers)
    prompt = random_tokens(1, PROMPT_LENGTH)
    sides = {
        "plain": partial(answer, plain, prompt),
        "separate": partial(answer_separately, dip, prompt, samples),
        "ensemble": partial(answer_by_ensemble, dip, prompt, samples),
    }
    for side in ("plain", "ensemble"):
        sides[side]()
    return [time_round(sides, number) for number in range(num_rounds)]


def scoring_row(hidden: int, samples: int, memory: Callable[..., int]) -> dict:
    """Compare k samples with the noise switched off, batch by batch."""
    rounds = time_scoring(hidden, samples)
    noise_off, ensemble = (memory("score", hidden, "all", k) for k in (0, samples))
    return {
        "hidden": hidden,
        "num_samples": samples,
        "num_requests": NUM_REQUESTS,
        **summarize("time_over_noise_off", [r["ensemble"] / r["noise off"] for r in rounds]),
        "num_rounds": len(rounds),
        "seconds": {side: sum(r[side] for r in rounds) for side in ("noise off", "ensemble")},
        "memory_over_noise_off": ensemble / noise_off,
        "noise_off_peak_mib": noise_off / 2**20,
    }


def time_scoring(hidden: int, samples: int) -> list[dict[str, float]]:
    """The seconds of both sides for each batch; the last one may be smaller."""
    model = build(hidden, "all")
    requests = random_tokens(NUM_REQUESTS, REQUEST_LENGTH)
    starts = range(0, NUM_REQUESTS, BATCH_SIZE)
    batches = [{name: tensor[start : start + BATCH_SIZE] for name, tensor in requests.items()} for start in starts]
    sides = {"noise off": 0, "ensemble": samples}
    for k in sides.values():
        score(model, batches[0], k)
    return [
        time_round({side: partial(score, model, batch, k) for side, k in sides.items()}, number)
        for number, batch in enumerate(batches)
    ]


def check_targets(rows: list[dict], hidden: int) -> list[dict]:
    """The targets, which are for the largest network, and whether the medians meet them."""
    checked = {
        TARGET_SAMPLES: (f"at least 2.5 times the throughput of {TARGET_SAMPLES} calls", "throughput_over_separate"),
        1: ("at most 1.05 times plain generate's time", "time_over_plain"),
    }
    targets = []
    for samples, (text, name) in checked.items():
        for row in rows:
            if (row["hidden"], row["layers"], row["num_samples"]) == (hidden, "all", samples):
                met = row[name] >= 2.5 if samples == TARGET_SAMPLES else row[name] <= 1.05
                targets.append({"target": f"hidden {hidden}, k = {samples}: {text}", name: row[name], "met": met})
    return targets


def print_tables(rows: list[dict], scoring: list[dict], targets: list[dict]) -> None:
    """Print one line per case, and one per target."""
    print("Generation: new tokens per second, and the ensemble against k calls and against one plain call (quartiles)")
    print(
        f"{'hidden':>6} {'layers':>6} {'k':>3}  {'plain':>7} {'k calls':>7} {'ens.':>7}   throughput / k calls   "
        "time / plain           memory / plain  / k calls"
    )
    for row in rows:
        speeds = " ".join(f"{speed:>7.1f}" for speed in row["tokens_per_second"].values())
        print(
            f"{row['hidden']:>6} {row['layers']:>6} {row['num_samples']:>3}  {speeds}   "
            f"{format_ratio(row, 'throughput_over_separate'):<22} {format_ratio(row, 'time_over_plain'):<22} "
            f"{row['memory_over_plain']:<15.3f} {row['memory_over_separate']:.3f}"
        )
    for row in scoring:
        noise_off, ensemble = row["seconds"].values()
        print(
            f"Scoring {row['num_requests']} requests, hidden {row['hidden']}: noise off {noise_off:.1f} s, "
            f"k = {row['num_samples']} {ensemble:.1f} s, time {format_ratio(row, 'time_over_noise_off')}, "
            f"memory {row['memory_over_noise_off']:.3f}"
        )
    for row in targets:
        text, value, met = row.values()
        print(f"{text}: {value:.3f}, {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
