"""Calibration, selective prediction and entropies: known answers, independent code, invariances, refusals."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from dipnet_hf.uncertainty import (
    answer_confidence,
    area_under_risk_coverage,
    auroc,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    predictive_entropies,
    reliability_bins,
    risk_coverage,
)

BINNINGS = ["width", "mass"]
SCALARS = {
    "ece": expected_calibration_error,
    "mass": lambda confidence, correct: expected_calibration_error(confidence, correct, 7, "mass"),
    "brier": brier_score,
    "nll": negative_log_likelihood,
    "auroc": auroc,
    "aurc": area_under_risk_coverage,
}


def sample(kind, n=500, seed=0):
    """Confidences and whether the answers are right, drawn at just these probabilities."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    if kind == "tied":  # the shares of 8 sampled answers
        confidence = rng.integers(0, 9, n) / 8
    return confidence, (rng.random(n) < confidence).astype(float)


def ece_by_loop(confidence, correct, bins):
    """The definition, answer by answer: `bins` are the lists of the answers' numbers."""
    total = 0.0
    for members in bins:
        if members:
            accuracy = sum(correct[i] for i in members) / len(members)
            mean = sum(confidence[i] for i in members) / len(members)
            total += len(members) / len(confidence) * abs(accuracy - mean)
    return total


# ---- calibration ----


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("num_bins", [1, 2, 15])
def test_bins_by_hand(binning, num_bins):
    rows = reliability_bins([0.2, 0.9, 0.4, 0.8], [0, 1, 1, 1], num_bins, binning)
    expected = {
        1: [(0.575, 0.75, 4)],
        2: [(0.3, 0.5, 2), (0.85, 1.0, 2)],
        15: [(0.2, 0, 1), (0.4, 1, 1), (0.8, 1, 1), (0.9, 1, 1)],
    }[num_bins]
    found = np.array([(row["confidence"], row["accuracy"], row["count"]) for row in rows])
    np.testing.assert_allclose(found, expected)
    if num_bins == 2:
        edges = [(0, 0.5), (0.5, 1)] if binning == "width" else [(0.2, 0.4), (0.8, 0.9)]
        assert [(row["lower"], row["upper"]) for row in rows] == edges


@pytest.mark.parametrize("num_bins", [3, 7, 10, 15, 49, 100])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(num_bins):
    confidence = [i / num_bins for i in range(num_bins + 1)]
    rows = reliability_bins(confidence, [1] * len(confidence), num_bins)
    assert [row["count"] for row in rows] == [2] + [1] * (num_bins - 1), "0 and the first edge share the first bin"
    assert [row["upper"] for row in rows] == confidence[1:]


def test_bins_of_equal_count():
    confidence, correct = sample("distinct", 503)
    counts = [row["count"] for row in reliability_bins(confidence, correct, 15, "mass")]
    assert len(counts) == 15 and max(counts) - min(counts) <= 1 and sum(counts) == 503


def test_equal_confidences_share_a_bin():
    confidence, correct = sample("tied")
    rows = reliability_bins(confidence, correct, 4, "mass")
    assert all(before["upper"] < after["lower"] for before, after in zip(rows, rows[1:]))
    constant = reliability_bins([0.5] * 9, [1, 0, 0] * 3, 4, "mass")
    assert [(row["count"], row["accuracy"]) for row in constant] == [(9, pytest.approx(1 / 3))]


@pytest.mark.parametrize("kind", ["distinct", "tied"])
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_of_equal_widths_is_the_definition(kind, num_bins):
    confidence, correct = sample(kind)
    bins = [[] for _ in range(num_bins)]
    for i, value in enumerate(confidence):
        inside = [b for b in range(num_bins) if b / num_bins < value <= (b + 1) / num_bins]
        bins[inside[0] if inside else 0].append(i)
    ours = expected_calibration_error(confidence, correct, num_bins)
    assert ours == pytest.approx(ece_by_loop(confidence, correct, bins))


@pytest.mark.parametrize("num_bins", [1, 10, 25])
def test_ece_of_equal_counts_is_the_definition(num_bins):
    confidence, correct = sample("distinct")
    bins = [part.tolist() for part in np.array_split(np.argsort(confidence), num_bins)]
    ours = expected_calibration_error(confidence, correct, num_bins, "mass")
    assert ours == pytest.approx(ece_by_loop(confidence, correct, bins))


@pytest.mark.parametrize("binning", BINNINGS)
def test_ece_of_calibrated_and_of_overconfident_answers(binning):
    n, num_bins = 20_000, 15
    confidence, correct = sample("distinct", n)
    # Each bin's gap is about |N(0, p (1 - p) / n_b)|; its mean over p in [0, 1] is 0.313 sqrt(num_bins / n), and the
    # mean of 15 of them deviates by a fifth of that.
    expected = 0.313 * math.sqrt(num_bins / n)
    assert 0 < expected_calibration_error(confidence, correct, num_bins, binning) < 2 * expected
    sharpened = np.sqrt(confidence)  # E[sqrt(p) - p] = 2/3 - 1/2
    ece = expected_calibration_error(sharpened, correct, num_bins, binning)
    assert abs(ece - 1 / 6) < 5 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("binning", BINNINGS)
def test_best_and_worst_calibration(binning):
    assert expected_calibration_error([0, 0, 1, 1], [0, 0, 1, 1], 5, binning) == 0
    assert expected_calibration_error([0, 0, 1, 1], [1, 1, 0, 0], 5, binning) == 1


# ---- scores ----


@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_scores_equal_scikit_learn(kind):
    confidence, correct = sample(kind)
    if kind == "tied":  # a right answer at 0 and a wrong one at 1: both clip alike
        correct[np.flatnonzero(confidence == 0)[0]], correct[np.flatnonzero(confidence == 1)[0]] = 1, 0
    assert brier_score(confidence, correct) == pytest.approx(metrics.brier_score_loss(correct, confidence))
    assert negative_log_likelihood(confidence, correct) == pytest.approx(metrics.log_loss(correct, confidence))
    assert auroc(confidence, correct) == pytest.approx(metrics.roc_auc_score(correct, confidence))


def test_scores_by_hand():
    confidence, correct = [0.9, 0.6, 0.6, 0.2], [1, 0, 1, 0]
    assert brier_score(confidence, correct) == pytest.approx((0.01 + 0.36 + 0.16 + 0.04) / 4)
    assert negative_log_likelihood(confidence, correct) == pytest.approx(-math.log(0.9 * 0.4 * 0.6 * 0.8) / 4)
    assert auroc(confidence, correct) == 3.5 / 4, "of four pairs three are in order and one is tied"


def test_surely_wrong_is_finite():
    assert negative_log_likelihood([1.0, 0.0], [0, 1]) == pytest.approx(-math.log(np.finfo(float).eps))
    assert negative_log_likelihood([1.0, 0.0], [1, 0]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize(
    "confidence, expected", [([0.1, 0.2, 0.8, 0.9], 1), ([0.9, 0.8, 0.2, 0.1], 0), ([0.5] * 4, 0.5)]
)
def test_auroc_of_perfect_inverted_and_constant_confidence(confidence, expected):
    assert auroc(confidence, [0, 0, 1, 1]) == expected


@pytest.mark.parametrize("correct", [[1, 1], [0, 0]])
def test_auroc_needs_right_and_wrong_answers(correct):
    with pytest.raises(ValueError, match="compares right answers with wrong ones, got [02] right and [02] wrong"):
        auroc([0.3, 0.4], correct)


# ---- selective prediction ----


def test_risk_and_coverage_by_hand():
    coverage, risk = risk_coverage([0.9, 0.6, 0.6, 0.2], [1, 0, 1, 0])
    assert coverage.tolist() == [0.25, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 1 / 3, 1 / 2])


def test_area_by_hand():
    # The second answer is one of two tied ones, wrong with probability 1/2.
    expected = (0 + 0.5 / 2 + 1 / 3 + 2 / 4) / 4
    assert area_under_risk_coverage([0.9, 0.6, 0.6, 0.2], [1, 0, 1, 0]) == pytest.approx(expected)


def test_area_without_ties_is_the_definition():
    confidence, correct = sample("distinct")
    wrong = 1 - correct[np.argsort(-confidence)]
    expected = np.mean([wrong[:i].mean() for i in range(1, len(wrong) + 1)])
    assert area_under_risk_coverage(confidence, correct) == pytest.approx(expected)


def test_area_with_ties_is_the_mean_over_their_orders():
    confidence, correct = sample("tied", 40)
    rng, areas = np.random.default_rng(1), []
    for _ in range(2000):
        broken = confidence + 1e-9 * rng.random(40)
        areas.append(area_under_risk_coverage(broken / 2, correct))
    exact = area_under_risk_coverage(confidence, correct)
    assert abs(np.mean(areas) - exact) < 5 * np.std(areas) / math.sqrt(len(areas))


def test_area_of_constant_perfect_and_inverted_confidence():
    correct = [1, 1, 1, 0]
    assert area_under_risk_coverage([0.5] * 4, correct) == pytest.approx(0.25)
    assert area_under_risk_coverage([0.9, 0.8, 0.7, 0.1], correct) == pytest.approx(0.25 / 4)
    assert area_under_risk_coverage([0.1, 0.2, 0.3, 0.9], correct) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert area_under_risk_coverage([0.3, 0.4], [1, 1]) == 0


# ---- all metrics ----


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("kind", ["distinct", "tied"])
def test_order_and_container_do_not_matter(name, kind):
    confidence, correct = sample(kind)
    expected = SCALARS[name](confidence, correct)
    order = np.random.default_rng(1).permutation(len(confidence))
    assert type(expected) is float
    assert SCALARS[name](confidence[order], correct[order]) == pytest.approx(expected)
    assert SCALARS[name](confidence.tolist(), correct.astype(bool).tolist()) == expected
    assert SCALARS[name](torch.tensor(confidence, requires_grad=True), torch.tensor(correct) == 1) == expected
    coarse = torch.tensor(confidence, dtype=torch.bfloat16)
    assert SCALARS[name](coarse, torch.tensor(correct).int()) == SCALARS[name](coarse.float().numpy(), correct)


def test_the_curve_does_not_depend_on_the_order():
    confidence, correct = sample("tied")
    order = np.random.default_rng(1).permutation(len(confidence))
    for ours, theirs in zip(risk_coverage(confidence, correct), risk_coverage(confidence[order], correct[order])):
        assert ours.tolist() == theirs.tolist() and len(ours) == 9


@pytest.mark.parametrize("metric", [reliability_bins, risk_coverage, *SCALARS.values()])
@pytest.mark.parametrize(
    "confidence, correct, message",
    [
        ([], [], r"at least one answer; got shapes \(0,\) and \(0,\)"),
        ([0.5], [1, 0], r"same length.*\(1,\) and \(2,\)"),
        ([[0.5]], [[1]], r"one dimension.*\(1, 1\)"),
        ([0.5, 1.5], [1, 0], r"must be in \[0, 1\], got 1.5 at index 1"),
        ([-0.7], [1], "got -0.7 at index 0; answer_confidence"),
        ([0.5, math.nan], [1, 0], "got nan at index 1"),
        ([0.5, math.inf], [1, 0], "got inf at index 1"),
        ([0.5, 0.5], [1, 0.5], "correct must be 0 or 1, got 0.5 at index 1"),
        ([0.5, 0.5], [1, None], "correct must be 0 or 1, got nan at index 1; leave unscored"),
    ],
)
def test_bad_data_are_refused(metric, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        metric(confidence, correct)


def test_bad_bins_are_refused():
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        reliability_bins([0.5], [1], 0)
    with pytest.raises(ValueError, match='"width" or "mass", got \'equal\''):
        expected_calibration_error([0.5], [1], 5, "equal")


@pytest.mark.parametrize("num_samples", range(1, 17))
def test_the_confidence_of_sure_samples_is_taken_for_1(num_samples):
    """Rounding lifts the float32 mean of some of them above 1."""
    log_probs = torch.log_softmax(torch.tensor([[[20.0, 0.0, -3.0]]]), -1).repeat(num_samples, 1, 1)
    confidence = predictive_entropies(log_probs).log_probs.exp().max(-1).values
    assert expected_calibration_error(confidence, [1]) < 1e-6
    assert expected_calibration_error([1 + 1e-7], [1]) == 0
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 1.0001"):
        expected_calibration_error([1.0001], [1])


# ---- one answer's confidence ----


@pytest.mark.parametrize(
    "answer, expected",
    [
        (["7", "7", "8", "7"], 0.75),
        (("7", None, None, "8"), 0.25),  # no answer is not an answer
        (["7", "8", "8", "7"], 0.5),
        ([None, None], 0.0),
        ([""], 1.0),
        ([math.log(0.25), 0.0], 0.5),
        (torch.tensor([math.log(0.25), 0.0], dtype=torch.float64), 0.5),
        (np.log([0.125, 0.5]), 0.25),
        ([0, 0], 1.0),
        ([-1.0, -math.inf], 0.0),
        ([1e-6], 1.0),  # rounding
    ],
)
def test_confidence_of_an_answer(answer, expected):
    confidence = answer_confidence(answer)
    assert type(confidence) is float and confidence == pytest.approx(expected)
    assert 0 <= confidence <= 1


@pytest.mark.parametrize(
    "answer, message",
    [
        ([], r"at least one entry, got shape \(0,\)"),
        (torch.zeros(2, 3), r"one dimension.*\(2, 3\)"),
        (torch.tensor(-1.0), "one dimension"),
        ("42", "single string '42'"),
        (["7", -0.5], "mixes 1 strings or None with 1 numbers"),
        ([None, -0.5, -0.5], "mixes 1 strings or None with 2 numbers"),
        ([-0.1, 0.7], "at most 0, got 0.7. Are they probabilities"),
        ([-0.1, math.nan], "at most 0, got nan"),
    ],
)
def test_what_is_no_answer(answer, message):
    with pytest.raises(ValueError, match=message):
        answer_confidence(answer)


# ---- predictive distributions ----


def draw(*shape, dtype=torch.float32):
    torch.manual_seed(0)
    return (3 * torch.randn(shape)).log_softmax(-1).to(dtype)


def direct(log_probs):
    """The textbook formulas in float64, all samples at once."""
    probs = log_probs.double().exp()
    mean = probs.mean(0)
    total = torch.special.entr(mean).sum(-1)
    expected = torch.special.entr(probs).sum(-1).mean(0)
    information = (probs * (probs / mean).log().nan_to_num()).sum(-1).mean(0)  # the mean KL to the mean
    return mean.log(), total, expected, information, probs.var(0, unbiased=False).sum(-1)


@pytest.mark.parametrize("shape", [(2, 5), (8, 3, 33), (16, 2, 3, 101)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entropies_equal_the_formulas(shape, dtype):
    log_probs = draw(*shape, dtype=dtype)
    # bfloat16 distributions do not sum to 1, so there the mean KL is not the difference of entropies.
    tolerance = dict(atol=2e-2 if dtype is torch.bfloat16 else 2e-6, rtol=1e-5)
    for ours, theirs in zip(predictive_entropies(log_probs), direct(log_probs)):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, **tolerance)


def test_entropies_by_hand():
    # Two samples, sure of different classes: all that is uncertain is which sample is right.
    disagreeing = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    prediction = predictive_entropies(disagreeing)
    assert prediction.log_probs.tolist() == pytest.approx([-math.log(2)] * 2)
    found = [entry.item() for entry in prediction[1:]]
    assert found == pytest.approx([math.log(2), 0, math.log(2), 0.5])
    # Two that agree on a fair coin: nothing to learn.
    found = [entry.item() for entry in predictive_entropies(torch.full((2, 2), -math.log(2)))[1:]]
    assert found == pytest.approx([math.log(2), math.log(2), 0, 0], abs=1e-7)


def test_one_sample_is_itself():
    log_probs = draw(1, 4, 50)
    prediction = predictive_entropies(log_probs)
    assert torch.equal(prediction.log_probs, log_probs[0])
    assert torch.equal(prediction.total_entropy, prediction.expected_entropy)
    assert not prediction.mutual_information.any() and not prediction.variance.any()


def test_impossible_classes_add_nothing():
    log_probs = draw(4, 3, 10)
    padded = torch.cat([log_probs, torch.full((4, 3, 2), -torch.inf)], -1)
    for ours, theirs in zip(predictive_entropies(padded)[1:], predictive_entropies(log_probs)[1:]):
        torch.testing.assert_close(ours, theirs)
    assert (predictive_entropies(padded).log_probs[:, 10:] == -torch.inf).all()


def test_entropies_are_ordered_and_bounded():
    prediction = predictive_entropies(draw(4, 200, 20))
    assert (prediction.mutual_information >= 0).all()
    assert (prediction.expected_entropy <= prediction.total_entropy).all()
    assert (prediction.mutual_information <= math.log(4)).all() and (prediction.total_entropy <= math.log(20)).all()
    assert (predictive_entropies(draw(1, 200, 20).expand(4, -1, -1)).mutual_information >= 0).all()
    for num_samples in range(1, 9):  # rounding lifts the mean of sure samples above 0
        sure = predictive_entropies(torch.tensor([0.0, -torch.inf]).expand(num_samples, -1))
        assert [entry.item() for entry in sure[1:4]] == [0, 0, 0]


def test_the_samples_order_does_not_matter():
    log_probs = draw(6, 3, 20)
    for ours, theirs in zip(predictive_entropies(log_probs.flip(0)), predictive_entropies(log_probs)):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "log_probs, message",
    [
        (torch.zeros(3), r"shape \(S, ..., V\), S at least 1, got \(3,\)"),
        (torch.zeros(0, 2, 3), r"got \(0, 2, 3\)"),
        (torch.zeros(2, 4), "must sum to 1.*from 4 to 4; give logits.log_softmax"),
        (torch.full((2, 4), math.nan), "from nan to nan"),
    ],
)
def test_what_is_no_distribution(log_probs, message):
    with pytest.raises(ValueError, match=message):
        predictive_entropies(log_probs)
