"""TFB: a finished LoRA adapter is given the most noise on its A that its loss bears, without any training."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .lora_noise import LoraNoise

_LOWEST, _HIGHEST, _NUM_STEPS = 1e-6, 1.0, 12  # of the search: 0.3% is the last step in a ratio of a million


@dataclass
class TFB(LoraNoise):
    """Training-free Bayesianization (Shi et al. 2024, arXiv 2412.05723) of LoRA, after any training.

        method = TFB()
        method.attach(model.eval())
        method.fit(batches)
        with method.ensemble(8):
            model.generate(**inputs)

    With the thin singular value decomposition `B = U diag(d) V^T`, `fit` writes `B' = U diag(d)` and `A' = V^T A` into
    the adapter, which are the same weights, and `A'_ij` gets the standard deviation `sigma / d_i`: the update `B' A'`
    gets noise of deviation sigma in every direction of `U`. Of the levels sigma at which the mean of `num_samples`
    networks has at most `loss_increase` more loss on the batches than the one without noise, the largest is found by
    bisection. (The authors' program compares losses of the network's own predictions, by ratio; for that, give
    batches with these as labels.) Training itself is left alone.

    Cost: nothing in training. `fit` makes up to 14 passes over the batches, with k rows for one. An ensemble: k rows.

    Args:
        loss_increase (`float`): what the noise may cost, in nats per supervised token.
        num_samples (`int`): of the mean in the search.

    Raises:
        ValueError: a setting out of range, or the model has no LoRA, or one that is not of linear layers alone.
    """

    loss_increase: float = 0.02
    num_samples: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.loss_increase < math.inf:
            raise ValueError(f"loss_increase of TFB must be positive, got {self.loss_increase!r}.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples of TFB must be at least 1, got {self.num_samples!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        super().install(model)
        self.sigma: float | None = None

    def fit(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Find the level of the noise, `sigma`: the standard deviation of the update in each direction.

        Args:
            batches (`Iterable`): inputs with `labels`, on the model's device.

        Raises:
            ValueError: the model is in training mode, nothing is supervised, or the smallest noise costs too much.
        """
        if self.network.training:
            raise ValueError("TFB measures the network without dropout: call model.eval().")
        if not any(site.b_OR.any() for site in self.sites):
            raise ValueError("TFB needs an adapter that has learned, and B of this one is zero: train it first.")
        batches = list(batches)
        self._rotate()
        self.sigma = 0.0
        allowed = self._loss(batches, with_noise=False) + self.loss_increase

        def is_allowed(sigma: float) -> bool:
            self.sigma = sigma
            return self._loss(batches, with_noise=True) <= allowed

        self.sigma = largest_allowed(is_allowed, _LOWEST, _HIGHEST, _NUM_STEPS)

    def std(self, number: int) -> torch.Tensor:
        """See `LoraNoise`."""
        if self.sigma is None:
            raise ValueError("TFB has no level of noise yet: call fit(batches) after the training.")
        b_OR = self.sites[number].b_OR.float()
        d_R = b_OR.norm(dim=0)  # the columns of B' are orthogonal
        is_there = d_R > d_R.max() * max(b_OR.shape) * torch.finfo(torch.float32).eps  # the others are B's rounding
        return torch.where(is_there, self.sigma / d_R, 0.0)[:, None]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        return {} if self.sigma is None else {"sigma": torch.tensor(self.sigma, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        if "sigma" in state:
            self._rotate()
            self.sigma = state["sigma"].item()

    @torch.no_grad()
    def _rotate(self) -> None:
        """Write A' and B', in the weights' dtype; an adapter that has them keeps them, and with them its samples."""
        for site in self.sites:
            a_RI, b_OR = site.a_RI.float().clone(), site.b_OR.float()
            unit_OR = torch.nn.functional.normalize(b_OR, dim=0)
            overlaps = (unit_OR.T @ unit_OR).fill_diagonal_(0.0)
            if overlaps.abs().max() <= max(4 * torch.finfo(site.b_OR.dtype).eps, 1e-5):
                continue
            u_OK, d_K, vh_KR = torch.linalg.svd(b_OR, full_matrices=False)
            site.a_RI.zero_()[: len(d_K)] = vh_KR @ a_RI  # a rank above the layer's outputs leaves zeros
            site.b_OR.zero_()[:, : len(d_K)] = u_OK * d_K

    @torch.no_grad()
    def _loss(self, batches: list[Mapping[str, Any]], with_noise: bool) -> float:
        """The loss per supervised token, of the mean of the samples or of the network without noise."""
        total, num_tokens = 0.0, 0
        with self.ensemble(self.num_samples) if with_noise else nullcontext():
            for batch in batches:
                number = int((batch["labels"][:, 1:] != -100).sum())
                total += self.network(**batch).loss.item() * number if number else 0.0
                num_tokens += number
        if num_tokens == 0:
            raise ValueError("No token of the batches has a label: there is no loss to find TFB's level by.")
        return total / num_tokens


def largest_allowed(is_allowed: Callable[[float], bool], low: float, high: float, num_steps: int) -> float:
    """Find the largest level that is allowed, if all smaller ones are, by bisection of its logarithm.

    Returns:
        `float`: an allowed level, at most a factor of `(high / low) ** (1 / 2 ** num_steps)` below the largest.

    Raises:
        ValueError: `low` is not allowed.
    """
    if is_allowed(high):
        return high
    if not is_allowed(low):
        raise ValueError(f"Even noise of {low:g} costs more than is allowed: allow more, or give more batches.")
    for _ in range(num_steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_allowed(middle) else (low, middle)
    return low
