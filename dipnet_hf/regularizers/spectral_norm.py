"""A penalty on the spectral norm of every weight matrix."""

from dataclasses import dataclass

import torch
from torch import nn

from .power_iteration import SpectralNorms
from .regularizer import Batch, Regularizer


@dataclass
class SpectralNorm(Regularizer):
    """Train on `loss + weight / 2 * sum of sigma(W)^2` (Yoshida and Miyato 2017, arXiv 1705.10941).

    `sigma(W)` is the largest singular value of a weight matrix that learns, see `SpectralNorms`, with the gradient
    `sigma u v^T` of half its square. Power iteration finds it, and goes on from one batch to the next. With LoRA it is
    that of `W + s B A`.

    Cost: no pass; a product of each matrix with a vector, and two more per step of the iteration.

    Args:
        weight (`float`): lambda of the paper.
        num_iterations (`int`): steps of the power iteration per batch; the paper takes one.

    Raises:
        ValueError: a setting out of range, or a model without matrices that the method can act on.
    """

    weight: float = 0.01
    num_iterations: int = 1

    def __post_init__(self) -> None:
        for name in ("weight", "num_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of SpectralNorm must be positive, got {getattr(self, name)!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self._norms = SpectralNorms(model, "SpectralNorm")

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        loss = batch.loss()
        self._norms.iterate(self.num_iterations)
        penalty = self.weight / 2 * self._norms.values().square().sum()
        return loss + batch.share * penalty.to(loss.device)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        return self._norms.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        self._norms.load_state_dict(state)
