"""GAM against closed forms of quadratics, a step written by hand and the plain penalty on the gradient's norm."""

import pytest
import torch

from dipnet_hf.regularizers import GAM, GradientNormPenalty
from tests.helpers import collate, make_rows, regularized_gradients
from tests.tiny_models import Quadratic, build


def test_on_a_quadratic_it_is_the_closed_form():
    """g = H w = (3, 4) and f = H g / |g| points to (3, 8), so w' = w + rho (3, 8) / sqrt(73); finite differences of a
    linear gradient are exact."""
    (found,) = regularized_gradients(GAM(rho=0.5, weight=0.1, radius=0.3), model := Quadratic([1.0, 2.0], [3.0, 2.0]))
    curvature, weights = model.curvature, model.weights.detach()
    nearby = curvature * (weights + 0.5 * torch.tensor([3.0, 8.0]).double() / 73**0.5)
    torch.testing.assert_close(found, curvature * weights + 0.1 * 0.5 * curvature * nearby / nearby.norm())
    assert weights.tolist() == [3.0, 2.0]


def test_on_a_network_it_is_the_step_written_by_hand():
    batch = collate(list(make_rows())[:4])
    found = regularized_gradients(GAM(rho=0.1, weight=0.5, radius=0.02), build("llama"), batch)
    model = build("llama")
    parameters = list(model.parameters())
    start = flat(parameters)

    def gradient(weights):
        torch.nn.utils.vector_to_parameters(weights, parameters)
        return flat(torch.autograd.grad(model(**batch).loss, parameters))

    def change(weights):
        g = gradient(weights)
        return (gradient(weights + 0.02 * g / g.norm()) - g) / 0.02

    f = change(start)
    expected = gradient(start) + 0.5 * 0.1 * change(start + 0.1 * f / f.norm())
    torch.testing.assert_close(flat(found), expected, atol=1e-4, rtol=1e-3)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_with_a_small_radius_it_is_the_penalty_on_the_norm_at_the_weights():
    (found,) = regularized_gradients(GAM(rho=1e-9, weight=1e8, radius=0.1), Quadratic([1.0, 2.0], [3.0, 2.0]))
    (plain,) = regularized_gradients(GradientNormPenalty(weight=0.1), Quadratic([1.0, 2.0], [3.0, 2.0]))
    torch.testing.assert_close(found, plain)


def test_a_step_without_a_gradient_stays_finite():
    (found,) = regularized_gradients(GAM(), Quadratic([1.0, 2.0], [0.0, 0.0]))
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"weight": float("nan")}, {"radius": -1.0}], ids=str)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="of GAM must be positive, got"):
        GAM(**settings)
