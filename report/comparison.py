"""Paired statistics of two methods: over seeds for a figure such as the NLL, over items for right answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, rankdata

LEVEL = 0.99  # of intervals; they go with tests at 0.01
SIGNIFICANCE = 0.01
# With fewer a bootstrap interval is too narrow to claim equivalence by: where the true difference is the margin, it
# does so in 5% of 1,500 simulations with 5 pairs of normal differences and in 1.5% with 12; 0.5% is its level.
MIN_PAIRS = 12


class Comparison(NamedTuple):
    """A method against another, by their differences with the same seeds."""

    num_pairs: int
    difference: float  # the mean of first - second
    low: float  # of its bootstrap interval
    high: float
    p_value: float  # Wilcoxon's signed-rank test, two-sided, before any correction


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare two methods by one figure per seed, in the same order of seeds.

    Raises:
        ValueError: not one value each for every seed, or none.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"A pair is two values of one seed, got {len(first)} and {len(second)} values.")
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    low, high = bootstrap_interval(differences)
    return Comparison(len(differences), float(differences.mean()), low, high, signed_rank(differences))


def bootstrap_interval(values: Sequence[float] | np.ndarray, num_resamples: int = 10_000) -> tuple[float, float]:
    """Give the percentile interval of the mean at `LEVEL`, over resampled values (Efron 1979); always the same one.

    With few values it is too narrow: of one value, it is that value.
    """
    values = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(0).integers(len(values), size=(num_resamples, len(values)))
    low, high = np.quantile(values[chosen].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def signed_rank(differences: np.ndarray) -> float:
    """Give the two-sided p-value of Wilcoxon's signed-rank test (1945), exact; pairs without a difference say nothing.

    Equal sizes share their middle rank, and the signs are as many coin tosses (Pratt and Gibbons 1981): exact match of
    few problems has ties, for which scipy's test takes a normal distribution or much longer.
    """
    differences = differences[differences != 0]
    doubled_ranks = (2 * rankdata(np.abs(differences))).astype(int)
    probability = np.ones(1)  # of each sum of the ranks of one sign
    for rank in doubled_ranks:
        probability = (np.pad(probability, (0, rank)) + np.pad(probability, (rank, 0))) / 2
    smaller_sum = min(doubled_ranks[differences > 0].sum(), doubled_ranks[differences < 0].sum())
    return min(1.0, 2 * float(probability[: smaller_sum + 1].sum()))


def mcnemar(first: Sequence[int], second: Sequence[int]) -> float:
    """Give the two-sided p-value of McNemar's exact test: the items that one has right more often, as coin tosses.

    Each item is counted once, whatever the number of seeds: answers of several seeds to one item are no new items.

    Args:
        first, second: how many seeds answered each item right, in the same order of items; 0 or 1 of one seed.
    """
    more_first = sum(a > b for a, b in zip(first, second, strict=True))
    more_second = sum(b > a for a, b in zip(first, second, strict=True))
    discordant = more_first + more_second
    return float(binomtest(more_first, discordant).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down method (1979), in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_p_value(num_pairs: int, num_comparisons: int) -> float:
    """Give what `signed_rank` and `holm` say at best, where all pairs differ in the same direction."""
    return min(1.0, num_comparisons * 2.0 ** (1 - num_pairs))


def verdict(comparison: Comparison, adjusted_p_value: float, margin: float) -> str:
    """Say what is shown of a figure of which less is better: by a test for a difference, by the interval for none.

    Args:
        comparison (`Comparison`): of the method that the verdict is on, and another.
        adjusted_p_value (`float`): its p-value among all comparisons.
        margin (`float`): differences up to it count as none.

    Returns:
        `str`: "better", "worse", "equivalent" or "no difference shown".
    """
    if adjusted_p_value < SIGNIFICANCE and comparison.difference != 0:
        return "better" if comparison.difference < 0 else "worse"
    if -margin < comparison.low and comparison.high < margin and comparison.num_pairs >= MIN_PAIRS:
        return "equivalent"
    return "no difference shown"
