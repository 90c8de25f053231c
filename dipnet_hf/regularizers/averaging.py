"""The average of the weights along the way of training, which is what is evaluated, saved and used."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from .regularizer import Batch, Regularizer, kept, precise


@dataclass
class WeightAverage(Regularizer):
    """The mean of the weights, exponential (EMA) or equal (SWA, Izmailov et al. 2018, arXiv 1803.05407).

    The n-th weights that are looked at move the mean by `max(1 - decay, 1 / n)` of their distance from it: the first
    1 / (1 - decay) count equally, so that the mean does not hang on where it began, and then older ones decay. With
    `decay = 1` all count equally, as in SWA. The weights that train are left alone. The mean of all that learns is
    what is evaluated and saved, and what the model has after training; buffers, such as the running statistics of
    batch normalization, are not averaged.

    Cost: no pass; a float32 copy of all that learns, another while the mean is in its place, both in checkpoints.

    Args:
        decay (`float`): of the mean at each look; 1 for SWA.
        start (`int`): the steps of the optimizer before the first look counts.
        period (`int`): the steps from one look to the next.

    Raises:
        ValueError: a setting out of range.
    """

    decay: float = 0.99
    start: int = 0
    period: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay of WeightAverage must be above 0 and at most 1, got {self.decay!r}.")
        if self.start < 0 or self.period < 1:
            raise ValueError(
                f"start of WeightAverage must be at least 0 and period at least 1, got {self.start!r} and "
                f"{self.period!r}."
            )

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._means = {name: precise(weight.detach()).clone() for name, weight in self._weights.items()}
        self._num_steps = self._num_looks = 0
        self._is_finished = False

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        self.check_watching()
        return batch.loss()

    @torch.no_grad()
    def after_step(self) -> None:
        """See `Regularizer`."""
        self._is_finished = False
        self._num_steps += 1
        num_counted = self._num_steps - self.start
        if num_counted <= 0 or num_counted % self.period:
            return
        self._num_looks += 1
        for name, weight in self._weights.items():
            self._means[name].lerp_(weight.to(self._means[name].dtype), max(1 - self.decay, 1 / self._num_looks))

    @contextmanager
    def finished(self) -> Iterator[None]:
        """See `Regularizer`: the weights are their mean, once there is one."""
        if self._is_finished:
            yield
            return
        with kept(list(self._weights.values())):
            self._put_means()
            yield

    def finish(self) -> None:
        """See `Regularizer`."""
        self._put_means()
        self._is_finished = True

    @torch.no_grad()
    def _put_means(self) -> None:
        if self._num_looks:
            for name, weight in self._weights.items():
                weight.copy_(self._means[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        counts = {"num_steps": torch.tensor(self._num_steps), "num_looks": torch.tensor(self._num_looks)}
        means = {f"mean.{name}": mean for name, mean in self._means.items()}
        return counts | means | {f"trained.{name}": weight for name, weight in self._weights.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`: the model gets the weights that trained, or their mean if training has finished."""
        self._num_steps, self._num_looks = int(state["num_steps"]), int(state["num_looks"])
        for name, weight in self._weights.items():
            self._means[name].copy_(state[f"mean.{name}"])
            weight.copy_(state[f"trained.{name}"])
        if self._is_finished:
            self._put_means()
