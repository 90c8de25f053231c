"""The penalty on spectral norms against the decomposition, and its state; see also `test_power_iteration`."""

import pytest
import torch

from dipnet_hf.regularizers import Batch, SpectralNorm
from tests.helpers import assert_resumes, collate, make_rows
from tests.tiny_models import build


def test_the_gradient_is_that_of_half_the_squares():
    """sigma u v^T of every matrix, from the singular value decomposition."""
    model, batch = build("llama"), collate(list(make_rows())[:2])
    method = SpectralNorm(weight=0.3, num_iterations=200)
    method.attach(model)
    loss = method.backward(model, batch)
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    plain = model(**batch).loss
    plain.backward()
    total = 0.0
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        expected = parameter.grad
        if parameter.dim() == 2:
            U, S, Vh = torch.linalg.svd(parameter.detach())
            expected = expected + 0.3 * S[0] * torch.outer(U[:, 0], Vh[0])
            total += 0.3 / 2 * S[0].item() ** 2
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    assert loss == pytest.approx(plain.item() + total, rel=1e-4)


def test_a_penalty_counts_by_the_share_of_its_batch():
    method = SpectralNorm(num_iterations=50)
    method.attach(build("llama"))
    whole, part = (method.loss(Batch({}, lambda: (torch.zeros(()), None), share)).item() for share in (1.0, 0.25))
    assert part == pytest.approx(whole / 4, rel=1e-4)


def test_a_resumed_run_goes_on_as_if_uninterrupted(tmp_path):
    assert_resumes(lambda: build("llama"), lambda: SpectralNorm(weight=0.1), tmp_path)


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"weight": float("nan")}, {"num_iterations": 0}], ids=str)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="of SpectralNorm must be positive, got"):
        SpectralNorm(**settings)
