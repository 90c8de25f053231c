"""Paired statistics against closed forms and published examples."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import wilcoxon

from report.comparison import (
    Comparison,
    bootstrap_interval,
    compare,
    holm,
    mcnemar,
    signed_rank,
    smallest_p_value,
    verdict,
)


def test_signed_rank_is_a_sum_over_signs():
    differences = np.array([1.0, 2.0, -3.0, 4.0, 5.0])
    sums = [sum(rank for rank in range(1, 6) if mask >> (rank - 1) & 1) for mask in range(32)]
    negative = 3
    assert signed_rank(differences) == pytest.approx(2 * sum(total <= negative for total in sums) / 32)
    assert signed_rank(np.array([0.0, *differences])) == signed_rank(differences)
    assert signed_rank(np.zeros(12)) == 1


def test_signed_rank_of_ties_is_the_share_of_all_signs():
    sizes, ranks = np.array([1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0]), np.array([1.5, 1.5, 3, 5, 5, 5, 7])
    signs = np.array(list(product([-1, 1], repeat=7)))
    sums = ((signs > 0) * ranks).sum(1)
    for chosen in signs[::9]:
        smaller = min(ranks[chosen > 0].sum(), ranks[chosen < 0].sum())
        assert signed_rank(sizes * chosen) == pytest.approx(min(1, 2 * (sums <= smaller).mean()))


@pytest.mark.parametrize("num_pairs", [6, 12, 40])
def test_signed_rank_without_ties_is_scipys(num_pairs):
    differences = np.random.default_rng(num_pairs).normal(0.5, 1.0, num_pairs)
    assert signed_rank(differences) == pytest.approx(wilcoxon(differences, method="exact").pvalue)


@pytest.mark.parametrize("num_pairs", [5, 10, 12])
def test_the_smallest_p_value_is_reached_when_all_pairs_agree(num_pairs):
    assert signed_rank(np.arange(1.0, num_pairs + 1)) == pytest.approx(smallest_p_value(num_pairs, 1))
    assert smallest_p_value(num_pairs, 3) == pytest.approx(holm([smallest_p_value(num_pairs, 1)] * 3)[0])


def test_mcnemar_counts_what_one_alone_has_right():
    first = [True] * 8 + [False] * 2 + [True] * 20
    second = [False] * 8 + [True] * 2 + [True] * 20
    # P(X <= 2) + P(X >= 8) of ten tosses
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar(first, second) == mcnemar(second, first)
    assert mcnemar(first, first) == 1


def test_mcnemar_counts_an_item_once_whatever_the_number_of_seeds():
    first, second = [5, 3, 2, 0, 4], [0, 2, 2, 1, 3]
    assert mcnemar(first, second) == mcnemar([1, 1, 0, 0, 1], [0, 0, 0, 1, 0])


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]


def test_the_bootstrap_interval_has_the_size_of_the_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values)
    half = 2.576 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_interval([2.5]) == (2.5, 2.5)
    assert bootstrap_interval([1.0, 2.0]) == bootstrap_interval([1.0, 2.0])


def test_pairs_cancel_what_a_seed_does_to_both():
    seeds = np.array([1.0, 5.0, 3.0, 9.0, 7.0, 2.0])
    result = compare(seeds - 0.5, seeds)
    assert result[:4] == pytest.approx((6, -0.5, -0.5, -0.5)) and result.p_value == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        compare([1, 2], [1])


@pytest.mark.parametrize(
    ("comparison", "adjusted", "expected"),
    [
        (Comparison(12, -0.1, -0.12, -0.08, 0.0), 0.005, "better"),
        (Comparison(12, 0.1, 0.08, 0.12, 0.0), 0.005, "worse"),
        (Comparison(12, -0.1, -0.12, -0.08, 0.005), 0.02, "no difference shown"),
        (Comparison(12, 0.001, -0.004, 0.006, 0.5), 1.0, "equivalent"),
        (Comparison(12, 0.001, -0.004, 0.011, 0.5), 1.0, "no difference shown"),
        (Comparison(4, 0.001, -0.004, 0.006, 0.5), 1.0, "no difference shown"),
    ],
)
def test_a_verdict_needs_a_test_or_an_interval(comparison, adjusted, expected):
    assert verdict(comparison, adjusted, margin=0.01) == expected


def test_methods_that_do_not_differ_are_seldom_told_apart():
    """Of families of nine comparisons over twelve seeds without any effect, at most 1% claim one: 5 sigma above."""
    generator = np.random.default_rng(0)
    num_families, num_wrong = 300, 0
    for _ in range(num_families):
        seeds = generator.normal(size=12)
        p_values = [signed_rank(seeds - generator.normal(size=12)) for _ in range(9)]
        num_wrong += min(holm(p_values)) < 0.01
    assert num_wrong <= 0.01 * num_families + 5 * (0.01 * 0.99 * num_families) ** 0.5
