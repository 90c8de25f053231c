"""Calibration, selective prediction and entropies: what confidences and predictive distributions say. numpy, torch.

The metrics take one confidence in [0, 1] and one `correct` in {0, 1} per answer, as lists, arrays or tensors of one
dimension. No result depends on the answers' order. Drawing is in `report`, sampling in `dipnet_hf.ensemble`.

Shape legend: S samples, N any number of leading dimensions (batch, sequence), V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

Values = Sequence[float] | np.ndarray | torch.Tensor

# Rounding may lift a float32 log-probability, `logits - logsumexp`, this far above 0, and a probability above 1.
LOG_PROB_TOLERANCE = 1e-5


def reliability_bins(
    confidence: Values, correct: Values, num_bins: int = 15, binning: str = "width"
) -> list[dict[str, float]]:
    """Group the answers by confidence: the rows of a reliability diagram, from low to high, empty bins left out.

    Args:
        num_bins (`int`): bins asked for, at least 1.
        binning (`str`): `"width"`, bins of equal width `(lower, upper]` with 0 in the first (Guo et al. 2017,
            arXiv 1706.04599); or `"mass"`, bins whose counts differ by at most one (Nixon et al. 2019, arXiv
            1904.01685). With `"mass"`, equal confidences stay together, in the bin of their middle rank, so bins may
            be uneven or empty.

    Returns:
        `list[dict]`: for each bin the mean `confidence`, the `accuracy`, the `count`, and `lower` and `upper`: its
        edges, or with `"mass"` its lowest and highest confidence.

    Raises:
        ValueError: `num_bins` or `binning` is not one of the above, or `confidence` or `correct` is out of range.
    """
    confidence, correct = _check(confidence, correct)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}.")
    if binning == "width":
        edges = np.arange(num_bins + 1) / num_bins  # the floats nearest to i / num_bins, which linspace may miss
        index = np.maximum(np.searchsorted(edges, confidence) - 1, 0)
        ranges = list(zip(edges[:-1], edges[1:], strict=True))
    elif binning == "mass":
        _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
        doubled_rank = 2 * np.cumsum(counts) - counts - 1  # of the middle of each group of ties; ranks begin at 0
        index = (doubled_rank * num_bins // (2 * len(confidence)))[group]
        ranges = None
    else:
        raise ValueError(f'binning must be "width" or "mass", got {binning!r}.')
    rows = []
    for number in np.unique(index):
        inside = confidence[index == number]
        lower, upper = ranges[number] if ranges else (inside.min(), inside.max())
        accuracy = float(correct[index == number].mean())
        row = dict(confidence=float(inside.mean()), accuracy=accuracy, count=len(inside))
        rows.append(row | dict(lower=float(lower), upper=float(upper)))
    return rows


def expected_calibration_error(
    confidence: Values, correct: Values, num_bins: int = 15, binning: str = "width"
) -> float:
    """Average |accuracy - confidence| over the rows of `reliability_bins`, weighted by count; from 0 to 1.

    Chance makes it larger: n calibrated answers, spread evenly over [0, 1], give about `0.3 * sqrt(num_bins / n)`.
    """
    rows = reliability_bins(confidence, correct, num_bins, binning)
    gaps = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return gaps / sum(row["count"] for row in rows)


def brier_score(confidence: Values, correct: Values) -> float:
    """Average `(confidence - correct)^2` (Brier 1950), from 0 to 1; 0.25 for a constant confidence of 1/2."""
    confidence, correct = _check(confidence, correct)
    return float(np.square(confidence - correct).mean())


def negative_log_likelihood(confidence: Values, correct: Values) -> float:
    """Average the log loss of `correct` under `confidence`, in nats per answer.

    Confidences are clipped to `[eps, 1 - eps]`, with float64's eps (2.2e-16): being sure and wrong costs 36 nats.
    """
    confidence, correct = _check(confidence, correct)
    eps = np.finfo(np.float64).eps
    confidence = confidence.clip(eps, 1 - eps)
    return float(-np.log(np.where(correct == 1, confidence, 1 - confidence)).mean())


def auroc(confidence: Values, correct: Values) -> float:
    """Estimate the probability that a right answer has a higher confidence than a wrong one; ties count half.

    Raises:
        ValueError: all answers are right, or all are wrong.
    """
    confidence, correct = _check(confidence, correct)
    num_right = int(correct.sum())
    num_wrong = len(correct) - num_right
    if not num_right or not num_wrong:
        raise ValueError(f"auroc compares right answers with wrong ones, got {num_right} right and {num_wrong} wrong.")
    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[group]  # from 1; tied answers share their middle rank
    return float((rank[correct == 1].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def risk_coverage(confidence: Values, correct: Values) -> tuple[np.ndarray, np.ndarray]:
    """Compute the risk of answering only above a threshold (Geifman & El-Yaniv 2017, arXiv 1705.08500).

    Returns:
        `(coverage, risk)`, one entry per distinct confidence, from the highest down: the share of the answers with at
        least this confidence, and the share of wrong ones among them. The last is `(1, 1 - accuracy)`.
    """
    num_covered, num_wrong = _cumulative(*_check(confidence, correct))
    return num_covered / num_covered[-1], num_wrong / num_covered


def area_under_risk_coverage(confidence: Values, correct: Values) -> float:
    """Average the risk of the i most confident answers over i = 1..n (AURC; Geifman et al. 2019, arXiv 1805.08206).

    For tied answers it is the expectation over all their orders, so a constant confidence gives `1 - accuracy`. Lower
    is better; 0 only if all are right.
    """
    num_covered, num_wrong = _cumulative(*_check(confidence, correct))
    i = np.arange(1, num_covered[-1] + 1)
    # A random order spreads the wrong answers of a tie evenly: their expected number is linear in i.
    return float((np.interp(i, [0, *num_covered], [0, *num_wrong]) / i).mean())


def answer_confidence(answer: Sequence[str | None] | Values) -> float:
    """Compute one confidence in [0, 1] from k sampled answers, or from the tokens of one answer.

    Args:
        answer: either the k final answers, each a `str`, or None if none was found. The confidence is the share of the
            most frequent answer among all k (self-consistency, Wang et al. 2023, arXiv 2203.11171), or 0 if no answer
            was found. Or the log-probabilities of one answer's tokens, in nats, one dimension. The confidence is the
            geometric mean of their probabilities.

    Raises:
        ValueError: `answer` is empty, one string, or a mixture of the two kinds; or a log-probability is NaN or above
            0 by more than 1e-5.
    """
    if isinstance(answer, str):
        raise ValueError(f"answer must be the list of the k sampled answers, got the single string {answer!r}.")
    texts = [] if isinstance(answer, torch.Tensor) else [a for a in answer if a is None or isinstance(a, str)]
    if texts and len(texts) < len(answer):
        raise ValueError(
            f"answer mixes {len(texts)} strings or None with {len(answer) - len(texts)} numbers; give either the k "
            "sampled answers or the token log-probabilities of one."
        )
    if texts:
        counts = Counter(text for text in texts if text is not None)
        return max(counts.values(), default=0) / len(texts)
    log_probs = _as_array(answer)
    if log_probs.ndim != 1 or not len(log_probs):
        raise ValueError(f"answer must have one dimension and at least one entry, got shape {log_probs.shape}.")
    if (wrong := log_probs[~(log_probs <= LOG_PROB_TOLERANCE)]).size:
        raise ValueError(f"Token log-probabilities must be at most 0, got {wrong[0]:.6g}. Are they probabilities?")
    return float(np.exp(min(log_probs.mean(), 0.0)))


class Prediction(NamedTuple):
    """The mean distribution of S samples, and how far they disagree. float32; entropies in nats.

    `total_entropy = expected_entropy + mutual_information`: all uncertainty is the part that every sample sees
    (aleatoric) and the part that comes from their disagreement (epistemic), at most ln S.
    """

    log_probs: torch.Tensor  # (N, V), the log of the mean probability
    total_entropy: torch.Tensor  # (N,), of the mean distribution
    expected_entropy: torch.Tensor  # (N,), the mean of the samples' entropies
    mutual_information: torch.Tensor  # (N,), the difference, at least 0
    variance: torch.Tensor  # (N,), of the probabilities over the samples, biased (divided by S), summed over V


def predictive_entropies(log_probs_SNV: torch.Tensor) -> Prediction:
    """Average S predictive distributions; split the entropy of the mean into the shared part and the disagreement.

    The split is that of Houlsby et al. 2011 (arXiv 1112.5745) and Depeweg et al. 2018 (arXiv 1710.07283). It is
    computed in float32, sample by sample, so that it needs only a few tensors of shape `(N, V)` besides its input.

    Args:
        log_probs_SNV (`torch.Tensor` of shape `(S, ..., V)`): normalized log-probabilities in nats, any float dtype;
            -inf where a class is impossible.

    Raises:
        ValueError: there is no dimension S or no sample, or the mean distribution does not sum to 1 within 0.1, the
            rounding of bfloat16.
    """
    if log_probs_SNV.dim() < 2 or not len(log_probs_SNV):
        raise ValueError(f"log_probs must be of shape (S, ..., V), S at least 1, got {tuple(log_probs_SNV.shape)}.")
    log_probs_NV = log_probs_SNV[0].float()
    for sample_NV in log_probs_SNV[1:]:
        log_probs_NV = torch.logaddexp(log_probs_NV, sample_NV.float())
    log_probs_NV = log_probs_NV - math.log(len(log_probs_SNV))
    probs_NV = log_probs_NV.exp()
    sums_N = probs_NV.sum(-1)
    if not ((sums_N - 1).abs() <= 0.1).all():
        raise ValueError(
            f"Probabilities must sum to 1 over the last dimension, got sums from {sums_N.min():.4g} to "
            f"{sums_N.max():.4g}; give logits.log_softmax(-1)."
        )
    total_N = _entropy(log_probs_NV)
    expected_N = torch.stack([_entropy(sample_NV.float()) for sample_NV in log_probs_SNV]).mean(0)
    distances = [(sample_NV.float().exp() - probs_NV).square().sum(-1) for sample_NV in log_probs_SNV]
    mutual_N = (total_N - expected_N).clamp(min=0)
    return Prediction(log_probs_NV, total_N, expected_N, mutual_N, torch.stack(distances).mean(0))


def _entropy(log_probs_NV: torch.Tensor) -> torch.Tensor:
    # The clamp makes 0 * log 0 a zero instead of NaN, and removes what rounding lifted above 0.
    return -(log_probs_NV.exp() * log_probs_NV.clamp(torch.finfo(log_probs_NV.dtype).min, 0)).sum(-1)


def _cumulative(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the answers with at least each distinct confidence, descending, and the wrong ones among them."""
    _, group, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    return np.cumsum(counts), np.cumsum(np.bincount(group, weights=1 - correct))


def _as_array(values) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()  # numpy has no bfloat16
    return np.asarray(values, dtype=np.float64)


def _check(confidence: Values, correct: Values) -> tuple[np.ndarray, np.ndarray]:
    """Turn both into float64 arrays, or say which entry is wrong."""
    confidence, correct = _as_array(confidence), _as_array(correct)
    confidence = np.where((confidence > 1) & (confidence <= 1 + LOG_PROB_TOLERANCE), 1.0, confidence)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            "confidence and correct must have one dimension and the same length, one entry per answer and at "
            f"least one answer; got shapes {confidence.shape} and {correct.shape}."
        )
    if (wrong := np.flatnonzero(~((confidence >= 0) & (confidence <= 1)))).size:
        raise ValueError(
            f"confidence must be in [0, 1], got {confidence[wrong[0]]:.6g} at index {wrong[0]}; "
            "answer_confidence turns log-probabilities into one."
        )
    if (wrong := np.flatnonzero((correct != 0) & (correct != 1))).size:
        raise ValueError(
            f"correct must be 0 or 1, got {correct[wrong[0]]:.6g} at index {wrong[0]}; leave unscored answers out."
        )
    return confidence, correct
