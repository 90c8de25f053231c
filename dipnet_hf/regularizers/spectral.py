"""A penalty that keeps the largest singular value of every weight matrix at one."""

from dataclasses import dataclass

import torch
from torch import nn

from .power_iteration import SpectralNorms
from .regularizer import Batch, Regularizer, precise, weights


@dataclass
class SpectralRegularization(Regularizer):
    """Train on `loss + weight * (sum of (sigma(W)^k - 1)^2 + sum of |b|^(2 k))` (Lewandowski et al. 2024, 2406.06811).

    `sigma(W)` is the largest singular value of a weight matrix that learns, found as in `SpectralNorm`; `b` are the
    biases that learn. The scales of normalization layers are left alone. The method was made for networks that start
    at random weights: the matrices of a pretrained language model are far from one, so that its weight must be small.

    Cost: no pass; a product of each matrix with a vector, and two more per step of the iteration.

    Args:
        weight (`float`): of the penalty.
        exponent (`int`): k of the paper.
        num_iterations (`int`): steps of the power iteration per batch; the paper takes one.

    Raises:
        ValueError: a setting out of range, or a model without matrices that the method can act on.
    """

    weight: float = 1e-4
    exponent: int = 2
    num_iterations: int = 1

    def __post_init__(self) -> None:
        for name in ("weight", "exponent", "num_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of SpectralRegularization must be positive, got {getattr(self, name)!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self._norms = SpectralNorms(model, "SpectralRegularization")
        self._biases = [parameter for name, parameter in weights(model).items() if name.rpartition(".")[2] == "bias"]

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        loss = batch.loss()
        self._norms.iterate(self.num_iterations)
        penalty = (self._norms.values() ** self.exponent - 1).square().sum().to(loss.device)
        for bias in self._biases:
            penalty = penalty + precise(bias).square().sum().to(loss.device) ** self.exponent
        return loss + batch.share * self.weight * penalty

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        return self._norms.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        self._norms.load_state_dict(state)
