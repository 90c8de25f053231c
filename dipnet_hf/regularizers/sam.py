"""Sharpness-aware minimization, SAM and its scale-invariant form ASAM: the gradient at the worst weights nearby."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .regularizer import Regularizer, kept, require_weights, with_gradients


@dataclass
class SAM(Regularizer):
    """SAM (Foret et al. 2021, arXiv 2010.01412, eq. 2 and algorithm 1); ASAM (Kwon et al. 2021, arXiv 2102.11600).

    The step takes the gradient at `w + e`, `e = rho * g / |g|`, where `g` is the gradient at `w`. With `adaptive`,
    `e = rho * T^2 g / |T g|`, `T = |w| + eta` by element (ASAM, eq. 8 and its algorithm). The norm is over all weights
    that learn. With accumulation `g` is that of the whole step, with several processes the mean of all of them.

    Cost: 2 forward and backward passes per step; a copy of the weights that learn.

    Args:
        rho (`float`): the radius; the papers use 0.05 and 0.5 (ASAM) for images.
        adaptive (`bool`): ASAM.
        eta (`float`): of ASAM, keeps weights near zero from being left out.

    Raises:
        ValueError: a setting out of range, or a model none of whose weights learn.
    """

    rho: float = 0.05
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        for name in ("rho", "eta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of SAM must be positive, got {getattr(self, name)!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        require_weights(model, "SAM")
        self._model = model

    def refine_gradient(self, recompute: Callable[[], None]) -> None:
        """See `Regularizer`."""
        parameters, gradients = with_gradients(self._model)
        with kept(parameters), torch.no_grad():
            scales = [parameter.abs() + self.eta if self.adaptive else torch.ones(()) for parameter in parameters]
            ascents = [scale * gradient for scale, gradient in zip(scales, gradients, strict=True)]
            size = self.rho / torch.nn.utils.get_total_norm(ascents).clamp(min=torch.finfo(torch.float32).tiny)
            for parameter, scale, ascent in zip(parameters, scales, ascents, strict=True):
                parameter.add_(size * scale * ascent)
            with torch.enable_grad():
                recompute()
