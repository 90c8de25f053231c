"""Gradient norm aware minimization: a penalty on the largest norm of the gradient nearby."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .finite_differences import copy_gradients, gradient_of_norm, moved
from .regularizer import Regularizer, require_weights, weights


@dataclass
class GAM(Regularizer):
    """Train on `loss + weight * rho * max |g(w')|` over `|w' - w| <= rho` (Zhang, X. et al. 2023, arXiv 2303.03108).

    One step of ascent finds `w' = w + rho * f / |f|`, where `f` is the gradient of `|g|` at `w`; the step takes
    `g(w) + weight * rho * f(w')` (eqs. 7 and 8). `f(w) = (g(w + r g / |g|) - g(w)) / r`, `r = radius`,
    stands for the product of Hessian and `g / |g|` (appendix D). What the authors' program does beyond that, mixing
    the gradients of the four passes and taking one part out, is left away. The norm is over all weights that learn;
    with accumulation `g` is that of the whole step, with several processes the mean of all.

    Cost: 4 forward and backward passes per step; two copies of the weights that learn and four of their gradients.

    Args:
        rho (`float`): the radius in which the norm is largest; 0.2 in the authors' program, for images.
        weight (`float`): of the penalty, alpha of the paper.
        radius (`float`): of the finite differences; 0.02 to 0.04 in the authors' program. The weights must resolve
            `radius / sqrt(number of weights)`: those of a network trained in pure bfloat16 do not.

    Raises:
        ValueError: a setting out of range, or a model none of whose weights learn.
    """

    rho: float = 0.2
    weight: float = 0.5
    radius: float = 0.02

    def __post_init__(self) -> None:
        for name in ("rho", "weight", "radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of GAM must be positive, got {getattr(self, name)!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        require_weights(model, "GAM")
        self._model = model

    def refine_gradient(self, recompute: Callable[[], None]) -> None:
        """See `Regularizer`."""
        gradients = copy_gradients(self._model)
        ascent = gradient_of_norm(self._model, recompute, self.radius)
        moving = [parameter for parameter in weights(self._model).values() if parameter in ascent]
        with moved(moving, [ascent[parameter] for parameter in moving], self.rho):
            recompute()
            steepness = gradient_of_norm(self._model, recompute, self.radius)
        for parameter, gradient in gradients.items():
            change = steepness.get(parameter, 0.0)
            parameter.grad = gradient + self.weight * self.rho * change
