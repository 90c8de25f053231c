"""The penalty towards one against autograd through the decomposition; see also `test_power_iteration`."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dipnet_hf.regularizers import SpectralRegularization
from tests.helpers import regularized_gradients
from tests.tiny_models import build, make_batch


class Biased(nn.Module):
    """Matrices, biases and the scale of a norm in float64; the loss is zero."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)
        self.double()

    def forward(self):
        return SimpleNamespace(loss=0.0 * self.first.weight.sum())


@pytest.mark.parametrize("exponent", [1, 2])
def test_the_gradient_is_that_of_the_penalty(exponent):
    torch.manual_seed(0)
    model = Biased()
    nn.init.normal_(model.norm.bias)
    method = SpectralRegularization(weight=0.3, exponent=exponent, num_iterations=500)
    found = dict(zip(dict(model.named_parameters()), regularized_gradients(method, model), strict=True))
    norms = [torch.linalg.matrix_norm(layer.weight, 2) for layer in (model.first, model.last)]
    biases = [model.first.bias.square().sum(), model.norm.bias.square().sum()]
    penalty = 0.3 * (sum((norm**exponent - 1) ** 2 for norm in norms) + sum(bias**exponent for bias in biases))
    names = ["first.weight", "last.weight", "first.bias", "norm.bias"]
    expected = torch.autograd.grad(penalty, [model.get_parameter(name) for name in names])
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
    assert found["norm.weight"] is None


def test_it_brings_singular_values_to_one_and_biases_to_zero():
    torch.manual_seed(0)
    model = Biased()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SpectralRegularization(weight=1.0, exponent=1)
    method.attach(model, optimizer)
    for _ in range(100):
        optimizer.zero_grad()
        method.backward(model, {})
        optimizer.step()
    for matrix in (model.first.weight, model.last.weight):
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1.0, abs=1e-3)
    assert model.first.bias.norm() < 1e-3


def test_its_state_is_the_vectors():
    method, other = SpectralRegularization(), SpectralRegularization()
    method.attach(model := build("llama"))
    method.backward(model, make_batch("llama"))
    other.attach(build("llama"))
    other.load_state_dict(method.state_dict())
    for name, vectors in method.state_dict().items():
        assert torch.equal(other.state_dict()[name], vectors)


@pytest.mark.parametrize(
    "settings", [{"weight": 0.0}, {"weight": float("nan")}, {"exponent": 0}, {"num_iterations": 0}], ids=str
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="of SpectralRegularization must be positive, got"):
        SpectralRegularization(**settings)
