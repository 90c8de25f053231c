"""SAM and ASAM against steps written by hand, closed forms of quadratics and finite differences."""

import pytest
import torch

from dipnet_hf.regularizers import SAM
from tests.helpers import collate, make_rows, regularized_gradients
from tests.tiny_models import Quadratic, build


def test_on_a_quadratic_it_is_the_closed_form():
    """H (w + rho H w / |H w|), with H w = (3, 4) of norm 5."""
    model = Quadratic([1.0, 2.0], [3.0, 2.0])
    (found,) = regularized_gradients(SAM(rho=0.5), model)
    torch.testing.assert_close(found, torch.tensor([3.0 + 0.3, 2.0 * (2.0 + 0.4)], dtype=torch.float64))
    assert model.weights.tolist() == [3.0, 2.0]


def test_adaptive_on_a_quadratic_it_is_the_closed_form():
    """T = |w| + eta = (4, 3), T g = (12, 12), T^2 g / |T g| = (48, 36) / (12 sqrt 2)."""
    (found,) = regularized_gradients(SAM(rho=0.5, adaptive=True, eta=1.0), Quadratic([1.0, 2.0], [3.0, 2.0]))
    moved = torch.tensor([3.0 + 0.5 * 48 / (12 * 2**0.5), 2.0 + 0.5 * 36 / (12 * 2**0.5)], dtype=torch.float64)
    torch.testing.assert_close(found, moved * torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_adaptive_does_not_depend_on_the_scale_of_weights():
    """ASAM's point: w of twice the size and inputs of half of it are the same network, and its worst loss is too."""
    for factor in (1.0, 2.0):
        model = Quadratic([1.0 / factor**2, 2.0 / factor**2], [3.0 * factor, 2.0 * factor])
        (found,) = regularized_gradients(SAM(rho=0.5, adaptive=True, eta=1e-12), model)
        if factor == 1.0:
            expected = found
    torch.testing.assert_close(found * factor, expected)


def test_on_a_network_it_is_the_step_written_by_hand():
    batch = collate(list(make_rows())[:4])
    found = regularized_gradients(SAM(rho=0.1), model := build("llama"), batch)
    other = build("llama")
    other(**batch).loss.backward()
    ascent = [parameter.grad.clone() for parameter in other.parameters()]
    norm = sum((g**2).sum() for g in ascent) ** 0.5
    with torch.no_grad():
        for parameter, g in zip(other.parameters(), ascent, strict=True):
            parameter += 0.1 * g / norm
    other.zero_grad()
    other(**batch).loss.backward()
    for parameter, g in zip(other.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, g)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build("llama").parameters(), strict=True))


def test_a_step_without_a_gradient_stays_finite():
    (found,) = regularized_gradients(SAM(), Quadratic([1.0, 2.0], [0.0, 0.0]))
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("settings", [{"rho": 0.0}, {"rho": float("nan")}, {"eta": -1.0}], ids=str)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match="of SAM must be positive, got"):
        SAM(**settings)
