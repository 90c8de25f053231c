"""Gradients at weights nearby: what penalties on the gradient's norm are made of, without second derivatives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .regularizer import kept, with_gradients


def copy_gradients(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """The gradients of the last backward pass by parameter: of the weights and of all else that learns."""
    return {parameter: parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None}


@contextmanager
def moved(parameters: Sequence[nn.Parameter], directions: Sequence[torch.Tensor], length: float) -> Iterator[None]:
    """Context in which parameters are moved by `length` along a direction, whatever the direction's own length."""
    with kept(parameters), torch.no_grad():
        norm = torch.nn.utils.get_total_norm(directions).clamp(min=torch.finfo(torch.float32).tiny)
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(length * direction / norm)
        with torch.enable_grad():
            yield


def gradient_of_norm(
    model: nn.Module, recompute: Callable[[], None], radius: float
) -> dict[nn.Parameter, torch.Tensor]:
    """Estimate the gradient of the gradient's norm, `(g(w + radius * g / |g|) - g(w)) / radius`.

    The norm is over the weights that learn. Its gradient is with respect to everything that learns.

    Args:
        model (`nn.Module`): has the gradients of its present weights; afterwards those of the last pass.
        recompute (`Callable`): see `Regularizer.refine_gradient`.
        radius (`float`): of the finite difference, in the units of the weights.
    """
    before = copy_gradients(model)
    with moved(*with_gradients(model), radius):
        recompute()
    # A pass that takes other ways through the network may leave parameters without a gradient.
    after = {
        parameter: torch.zeros_like(g) if parameter.grad is None else parameter.grad for parameter, g in before.items()
    }
    return {parameter: (after[parameter] - gradient) / radius for parameter, gradient in before.items()}
