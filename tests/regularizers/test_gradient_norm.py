"""The penalty on the gradient's norm against closed forms, exact second derivatives and SAM."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dipnet_hf.regularizers import SAM, GradientNormPenalty
from tests.helpers import collate, dip_model, make_rows, regularized_gradients
from tests.tiny_models import Quadratic, build


def test_on_a_quadratic_it_is_the_closed_form():
    """The gradient of |H w| is H H w / |H w|, and finite differences of a linear gradient are exact."""
    (found,) = regularized_gradients(
        GradientNormPenalty(weight=0.1, radius=0.5), model := Quadratic([1.0, 2.0], [3.0, 2.0])
    )
    torch.testing.assert_close(found, torch.tensor([3.0 + 0.1 * 3 / 5, 4.0 + 0.1 * 8 / 5], dtype=torch.float64))
    assert model.weights.tolist() == [3.0, 2.0]


def test_squared_on_a_quadratic_it_is_the_closed_form():
    """The gradient of |H w|^2 is 2 H H w."""
    penalty = GradientNormPenalty(weight=0.1, radius=0.5, squared=True)
    (found,) = regularized_gradients(penalty, Quadratic([1.0, 2.0], [3.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([3.0 + 0.1 * 6, 4.0 + 0.1 * 16], dtype=torch.float64))


@pytest.mark.parametrize("squared", [False, True])
def test_on_a_network_it_is_the_gradient_of_the_penalized_loss(squared):
    torch.manual_seed(0)
    model = Network()
    penalty = GradientNormPenalty(weight=0.1, radius=1e-6, squared=squared)
    found = regularized_gradients(penalty, model)
    loss = model().loss
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    norm = sum((gradient**2).sum() for gradient in first).sqrt()
    expected = torch.autograd.grad(loss + 0.1 * norm ** (2 if squared else 1), list(model.parameters()))
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)


class Network(nn.Sequential):
    """Two layers in float64 on fixed inputs and targets."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.inputs, self.targets = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        self.double()

    def forward(self):
        return SimpleNamespace(loss=(super().forward(self.inputs) - self.targets).square().mean())


def test_a_weight_of_the_radius_is_sam():
    batch = collate(list(make_rows())[:4])
    found = regularized_gradients(GradientNormPenalty(weight=0.1, radius=0.1), build("llama"), batch)
    for gradient, other in zip(found, regularized_gradients(SAM(rho=0.1), build("llama"), batch), strict=True):
        torch.testing.assert_close(gradient, other)


def test_log_variances_learn_and_are_not_moved():
    """The noise is no weight: it does not count in the norm, and the penalty has a gradient with respect to it."""
    batch, seen = collate(list(make_rows())[:2]), []
    for penalty in (GradientNormPenalty(weight=0.1, radius=0.1), SAM(rho=0.1)):
        model = dip_model(num_samples=1)
        model.calibrate([collate(list(make_rows()))])
        torch.manual_seed(0)
        regularized_gradients(penalty, model.train(), batch)
        seen.append([p.grad for name, p in model.named_parameters() if "dip_logvar" in name])
    for gradient, other in zip(*seen, strict=True):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().max() > 0


def test_a_step_without_a_gradient_stays_finite():
    (found,) = regularized_gradients(GradientNormPenalty(), Quadratic([1.0, 2.0], [0.0, 0.0]))
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("settings", [{"weight": 0.0}, {"weight": float("nan")}, {"radius": -1.0}], ids=str)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="of GradientNormPenalty must be positive, got"):
        GradientNormPenalty(**settings)
