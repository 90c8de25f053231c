"""The figures of a study's rows: one method with one way of answering, over the seeds whose cells are done.

A cell's `result` is its `result.json`, an `answer` one entry of `result["answers"]`.
"""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import mean, median, stdev
from typing import TypedDict

import numpy as np
from safetensors.numpy import load_file

from dipnet_hf.uncertainty import reliability_bins, risk_coverage
from report.comparison import bootstrap_interval

HEADINGS = {
    "nll": "NLL",
    "token_accuracy": "token accuracy",
    "token_ece": "token ECE",
    "token_brier": "token Brier",
    "best_validation_nll": "validation NLL",
    "exact_match": "exact match",
    "answer_ece": "answer ECE",
    "answer_brier": "answer Brier",
    "auroc": "AUROC",
    "aurc": "AURC",
    "lipschitz": "Lipschitz constant",
    "layer_noise_rise": "NLL rise, noise at the layers",
    "weight_noise_rise": "NLL rise, noise in the weights",
}
NLL_OF_OTHER_DATA = f" {HEADINGS['nll']}"  # behind a task's name
SMOOTHNESS = ("lipschitz", "layer_noise_rise", "weight_noise_rise")
HIGHER_IS_BETTER = ("token_accuracy", "exact_match", "auroc")
ONE_PASS = "one pass"  # the answer of a plain pass through the model
PLAIN = "plain"  # the method that costs are relative to and deep ensembles are made of, where a study has it
PLAIN_AT_TWICE_THE_TIME = "plain_twice_as_long"
MOST_SECONDS = 2.0  # of training, relative to plain, that count as its cost
SECONDS_OF_A_PAIR = 3600.0  # between the ends of two cells whose times are compared
NUM_CURVE_POINTS = 50  # of a risk-coverage curve
LEAST_COVERAGE = 0.05  # where one begins: before, the risk is that of a few answers


class Time(TypedDict):
    """How long a cell's training took, and when the cell ended, both in seconds."""

    seconds: float
    ended: float  # since the epoch


def num_passes(answer: str) -> int:
    """Tell how many passes through the model an answer takes: k for "mean of k", one for all others."""
    return int(answer.removeprefix("mean of ")) if answer.startswith("mean of ") else 1


def row_name(row: dict) -> str:
    """Name a method and, if it is not a plain pass, its way of answering."""
    return row["method"] if row["answer"] == ONE_PASS else f"{row['method']} ({row['answer']})"


def headings(names: Sequence[str]) -> tuple[str, ...]:
    """Name figures as a table does; those of other data sets have their names already."""
    return tuple(HEADINGS.get(name, name) for name in names)


def is_nll_of_other_data(name: str) -> bool:
    """Tell whether a figure is the NLL of a task of another distribution."""
    return name.endswith(NLL_OF_OTHER_DATA)


def own_task(result: dict) -> str | None:
    """Name the task whose problems are those of the held-out NLL; tasks with a file are of other distributions."""
    tasks = result["provenance"]["config"]["evaluation"]["tasks"]
    return next((name for name, path in tasks.items() if path is None), None)


def figures(result: dict, answer: str) -> dict[str, float]:
    """Collect one cell's figures by name; those of another distribution's task begin with its name.

    What was not generated, and an AUROC that is not defined, is left out.
    """
    values = result["answers"][answer]
    found = {name: values[name] for name in ("nll", "token_accuracy", "token_ece", "token_brier")}
    validation = [nll for nll in _validation_by_step(result).values() if nll < inf]  # nor NaN, of a run that diverged
    if answer == ONE_PASS and validation:  # as validation problems are answered
        found["best_validation_nll"] = min(validation)
    found |= values.get("smoothness", {})
    for task, scores in values["scores"].items():
        of_task = _scores(scores)
        if task == own_task(result):
            found |= of_task
        else:
            found |= {f"{task} {HEADINGS[name]}": score for name, score in of_task.items() if name == "exact_match"}
            found |= {f"{task}{NLL_OF_OTHER_DATA}": scores["nll"]}
    return {name: value for name, value in found.items() if value is not None}


def _scores(scores: dict) -> dict[str, float | None]:
    """Take the task's first filter, such as strict-match; nothing of a single problem."""
    if scores.get("n") == 1:
        return {}
    metric, _, of_filter = next((key for key in scores if key.startswith(("exact_match,", "acc,"))), "").partition(",")
    if not metric:
        return {}
    names = {"exact_match": metric, "answer_ece": "ece", "answer_brier": "brier", "auroc": "auroc", "aurc": "aurc"}
    return {name: scores.get(f"{theirs},{of_filter}") for name, theirs in names.items()}


def generated(result: dict, answer: str) -> tuple[list[float], list[int]] | None:
    """Give the confidence of each problem's generated answer and whether it is right; None of fewer than two."""
    by_filter = result["answers"][answer]["problems"].get(own_task(result))
    if not by_filter or len(next(iter(by_filter.values()))["correct"]) < 2:
        return None
    first = next(iter(by_filter.values()))
    return first["confidence"], first["correct"]


def spread(values: Mapping[str, float]) -> dict:
    """Summarize one value per seed: mean, sample standard deviation (None of one value) and bootstrap interval."""
    numbers = list(values.values())
    low, high = bootstrap_interval(numbers)
    deviation = stdev(numbers) if len(numbers) > 1 else None
    return {"values": dict(values), "mean": mean(numbers), "std": deviation, "low": low, "high": high}


def spreads(by_seed: Mapping[str, Mapping[str, float]]) -> dict[str, dict]:
    """Summarize `{seed: {figure: value}}` by figure; a figure may lack some seeds."""
    names = dict.fromkeys(name for values in by_seed.values() for name in values)
    return {name: spread({seed: v[name] for seed, v in by_seed.items() if name in v}) for name in names}


def answer_curves(pooled: Sequence[tuple[list[float], list[int]]]) -> dict:
    """Compute the reliability diagram and the risk-coverage curve of all seeds' generated answers together.

    Args:
        pooled: one `(confidence, correct)` per seed, at least one.
    """
    confidence = np.concatenate([values for values, _ in pooled])
    correct = np.concatenate([values for _, values in pooled])
    coverage, risk = risk_coverage(confidence, correct)
    first = int(np.searchsorted(coverage, LEAST_COVERAGE))
    chosen = np.unique(np.linspace(first, len(coverage) - 1, NUM_CURVE_POINTS).round().astype(int))
    return {
        "reliability": reliability_bins(confidence, correct),
        "risk_coverage": [[float(coverage[index]), float(risk[index])] for index in chosen],
    }


def _validation_by_step(result: dict) -> dict[int, float]:
    """The first value of a step counts: some result files also have the test problems' NLL, at the last step."""
    return {entry["step"]: entry["nll"] for entry in reversed(result["validation"])}


def validation_curve(results: Sequence[dict]) -> list[dict]:
    """Average the validation NLL during training over seeds, at the steps that all of them have."""
    curves = [_validation_by_step(result) for result in results]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return [{"step": step, "nll": mean(curve[step] for curve in curves)} for step in steps]


def noise_by_site(results: Sequence[dict]) -> list[dict] | None:
    """Average each site's learned standard deviation, over that at which it began, over seeds; None without noise."""
    if not results or any(not result["noise"] for result in results):
        return None
    return [
        {"name": sites[0]["name"], "relative_std": mean(site["std"] / site["init_std"] for site in sites)}
        for sites in zip(*(result["noise"] for result in results), strict=True)
    ]


def relative_seconds(
    times: Mapping[str, Mapping[str, Time]], of_plain: Mapping[str, Mapping[str, Time]]
) -> float | None:
    """Compare times on one machine: the median over seeds of a row's time over plain's; None without a pair.

    Only cells that ended within an hour of each other are a pair: what else a machine did then slowed down both.

    Args:
        times, of_plain: by machine and seed; those of two machines do not compare. The machine with most pairs counts.
    """
    ratios = []
    for machine, by_seed in times.items():
        plain = of_plain.get(machine, {})
        pairs = [(time, plain[seed]) for seed, time in by_seed.items() if seed in plain]
        pairs = [pair for pair in pairs if abs(pair[0]["ended"] - pair[1]["ended"]) < SECONDS_OF_A_PAIR]
        ratios.append([ours["seconds"] / theirs["seconds"] for ours, theirs in pairs])
    most = max(ratios, key=len, default=[])
    return median(most) if most else None


def rows_of_equal_cost(rows: Sequence[dict]) -> list[dict]:
    """Choose what takes one pass at inference and at most `MOST_SECONDS`, from the least NLL to the largest."""
    found = [row for row in rows if row["num_passes"] == 1 and "nll" in row["figures"]]
    found = [row for row in found if row["relative_seconds"] is not None and row["relative_seconds"] <= MOST_SECONDS]
    return sorted(found, key=lambda row: row["figures"]["nll"]["mean"])


def plain_at_equal_time(rows: Sequence[dict], row: dict) -> dict | None:
    """Find what plain training does with as much: a run of twice the steps for one pass, k runs for k passes."""
    is_one_pass = row["num_passes"] == 1
    for other in rows:
        is_plain = other["method"] == PLAIN_AT_TWICE_THE_TIME if is_one_pass else "is_deep_ensemble" in other
        if is_plain and other["num_passes"] == row["num_passes"] and other["num_seeds"]:
            return other
    return None


def ensemble_nll(members: Sequence[np.ndarray]) -> float:
    """Compute the NLL of the mean of several models' probabilities, in nats per token.

    Args:
        members: for each model the log-probabilities of the target tokens, of the same shape.
    """
    return float(-(np.logaddexp.reduce(np.stack(members)) - np.log(len(members))).mean())


def token_log_probs(result: dict, path: Path, answer: str) -> np.ndarray | None:
    """Read the targets' log-probabilities beside a result file; None if there are none, or of another run."""
    if not path.is_file():
        return None
    log_probs = load_file(path)[answer][:, 0].astype(np.float64)
    is_same = len(log_probs) == result["answers"][answer]["num_tokens"]
    return (
        log_probs if is_same and np.isclose(-log_probs.mean(), result["answers"][answer]["nll"], rtol=1e-4) else None
    )
