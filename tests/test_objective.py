"""Eqs. (3) and (4) as functions of tensors, by definition and by known answers."""

import math

import pytest
import torch

from dipnet_hf import kl_weights
from dipnet_hf.objective import prior_loss, stability_penalty


def test_kl_weights_give_the_kl_divergence_up_to_a_constant():
    alpha, beta = kl_weights(prior_std=0.3, weight=2.0)
    gamma = 0.3**2
    prior = torch.distributions.Normal(0.0, 0.3)
    values = []
    for variance in (0.01, 0.09, 1.0):
        kl = torch.distributions.kl_divergence(torch.distributions.Normal(0.0, math.sqrt(variance)), prior)
        values.append(alpha * variance - beta * math.log(variance) - 2.0 * float(kl))
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    logvar = torch.tensor([math.log(gamma)], requires_grad=True)
    prior_loss([logvar], alpha, beta).backward()
    assert abs(float(logvar.grad)) < 1e-6  # the minimum is at lambda = gamma


@pytest.mark.parametrize("bad", [dict(prior_std=0.0, weight=1.0), dict(prior_std=-1.0, weight=1.0)])
def test_kl_weights_refuse_a_prior_without_width(bad):
    with pytest.raises(ValueError, match="prior_std must be positive"):
        kl_weights(**bad)
    with pytest.raises(ValueError, match="weight must not be negative, got -1"):
        kl_weights(0.1, -1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_prior_loss_equals_eq_3(reduction):
    logvars = [torch.randn(5), torch.randn(3)]
    values = [0.7 * math.exp(v) - 0.2 * v for logvar in logvars for v in logvar.tolist()]
    expected = sum(values) / (len(values) if reduction == "mean" else 1)
    assert float(prior_loss(logvars, 0.7, 0.2, reduction)) == pytest.approx(expected, rel=1e-5)


def test_zero_variance_without_a_prior_costs_nothing():
    assert float(prior_loss([torch.full((3,), -math.inf)], 0.0, 0.0)) == 0.0


def test_stability_penalty_is_the_unbiased_variance():
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])  # 3 samples of 2 tokens
    assert float(stability_penalty(values.flatten(), 3)) == pytest.approx(4.0 + 3.0)
    logits = torch.randn(4 * 6, 7)
    assert float(stability_penalty(logits, 4)) == pytest.approx(float(logits.view(4, 6, 7).var(0).sum()), rel=1e-5)
