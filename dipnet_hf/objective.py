"""The training objective, eqs. (2) to (4), as pure functions of tensors.

Shape legend: S samples, N supervised tokens, V vocabulary. Rows of `(S * N, ...)` are sample by sample.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Terms(NamedTuple):
    """Eq. (2), and eq. (4) times its weight, both summed over `num_tokens` supervised tokens.

    `total` is `nll + stability` and has the gradients; `nll` and `stability` are detached.
    """

    total: torch.Tensor
    nll: torch.Tensor
    stability: torch.Tensor
    num_tokens: int


def kl_weights(prior_std: float, weight: float) -> tuple[float, float]:
    """Give the `(alpha, beta)` for which eq. (3) is `weight * KL(N(0, lambda) || N(0, prior_std^2))` up to a constant.

    `alpha = weight / (2 prior_std^2)` and `beta = weight / 2`; without data the variances settle at `prior_std^2`.

    Raises:
        ValueError: `prior_std` is not positive, or `weight` is negative.
    """
    if not prior_std > 0:
        raise ValueError(f"prior_std must be positive, got {prior_std}.")
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}.")
    return weight / (2 * prior_std**2), weight / 2


def prior_loss(logvars: Sequence[torch.Tensor], alpha: float, beta: float, reduction: str = "mean") -> torch.Tensor:
    """Eq. (3): `alpha * lambda - beta * ln(lambda)`, averaged or summed over all sites and channels.

    Args:
        logvars (`Sequence[torch.Tensor]`): `ln(lambda)`, one vector per site.
        alpha, beta (`float`): the weights of the variance and of its logarithm.
        reduction (`str`): `"mean"`, or `"sum"`, the paper's own.
    """
    logvar = torch.cat([logvar.to(logvars[0].device) for logvar in logvars])
    # A zero weight drops its term instead of multiplying it: at zero variance 0 * inf would be NaN.
    terms = torch.zeros_like(logvar)
    if alpha:
        terms = terms + alpha * logvar.exp()
    if beta:
        terms = terms - beta * logvar
    return terms.mean() if reduction == "mean" else terms.sum()


def data_terms_of_logits(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    num_samples: int,
    stability_weight: float = 0.0,
    stability_target: str = "log_prob",
) -> Terms:
    """Compute eq. (2), and eq. (4) times its weight, from the logits of `num_samples` samples.

    Args:
        logits_RV (`torch.Tensor` of shape `(S * N, V)`): at the supervised tokens, sample by sample.
        targets_R (`torch.Tensor` of shape `(S * N,)`): int64, the same in every sample.
        num_samples (`int`): S, at least 2 for a `stability_weight` that is not zero.
        stability_weight (`float`): of eq. (4).
        stability_target (`str`): f of eq. (4): `"log_prob"` of the target, or `"logits"`, summed over V.
    """
    log_probs_R = -F.cross_entropy(logits_RV.float(), targets_R, reduction="none")
    nll = -log_probs_R.sum() / num_samples
    stability = nll.new_zeros(())
    if stability_weight:
        outputs = log_probs_R if stability_target == "log_prob" else logits_RV
        stability = stability_weight * stability_penalty(outputs, num_samples)
    return Terms(nll + stability, nll.detach(), stability.detach(), len(targets_R) // num_samples)


def stability_outputs(logits_RV: torch.Tensor, targets_R: torch.Tensor, stability_target: str) -> torch.Tensor:
    """f of eq. (4), for `stability_penalty`; the arguments are those of `data_terms_of_logits`."""
    if stability_target == "logits":
        return logits_RV
    return -F.cross_entropy(logits_RV.float(), targets_R, reduction="none")


def stability_penalty(outputs_SN: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (4) before its weight: the unbiased variance over the S samples, summed over the supervised tokens.

    It is unbiased for independent samples, but not for pairs of opposite noise. With pairs, the expectation for an f
    that is linear in the noise is S / (S - 1) times the variance, and a single pair does not see the even part of f.
    `sampling="independent"` avoids both.

    Args:
        outputs_SN (`torch.Tensor` of shape `(S * N,)` or `(S * N, V)`): target log-probabilities or logits at the
            supervised tokens, sample by sample; the variance of logits is summed over V.
        num_samples (`int`): S, at least 2.
    """
    samples = outputs_SN.float().unflatten(0, (num_samples, -1))
    return (samples - samples.mean(0)).square().sum() / (num_samples - 1)
