"""A penalty on the norm of the loss's gradient, by finite differences."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .finite_differences import copy_gradients, gradient_of_norm
from .regularizer import Regularizer, require_weights, with_gradients


@dataclass
class GradientNormPenalty(Regularizer):
    """Train on `loss + weight * |g|`, where `g` is the gradient of the loss (Zhao et al. 2022, arXiv 2202.03599).

    The gradient of `|g|` is `H g / |g|`, for which `(g(w + r g / |g|) - g(w)) / r` stands, so that a step takes
    `(1 - weight / r) g(w) + weight / r g(w + r g / |g|)`, `r = radius`: at `weight = radius` this is SAM. With
    `squared` the penalty is `weight * |g|^2`, the explicit form of the regularizer that steps of finite size imply
    (Barrett and Dherin 2021, arXiv 2009.11162); its gradient is `2 |g|` times that of `|g|`. The norm is over all
    weights that learn; with accumulation `g` is that of the whole step, with several processes the mean of all.

    Cost: 2 forward and backward passes per step; a copy of the weights that learn and two of their gradients.

    Args:
        weight (`float`): of the penalty.
        radius (`float`): of the finite difference. The weights must resolve `radius / sqrt(number of weights)`: those
            of a network trained in pure bfloat16 do not.
        squared (`bool`): penalize the square. It depends on the scale of the loss, so not with float16's loss scaling.

    Raises:
        ValueError: a setting out of range, or a model none of whose weights learn.
    """

    weight: float = 0.03
    radius: float = 0.05
    squared: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of GradientNormPenalty must be positive, got {getattr(self, name)!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        require_weights(model, "GradientNormPenalty")
        self._model = model

    def refine_gradient(self, recompute: Callable[[], None]) -> None:
        """See `Regularizer`."""
        gradients = copy_gradients(self._model)
        norm = torch.nn.utils.get_total_norm(with_gradients(self._model)[1])
        weight = 2 * self.weight * norm if self.squared else self.weight
        for parameter, change in gradient_of_norm(self._model, recompute, self.radius).items():
            parameter.grad = gradients[parameter] + weight * change
