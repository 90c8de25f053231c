"""Weights as a bounded function of what is learned in their place."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from .regularizer import Regularizer, precise, weights

_LAYERS = (nn.Linear, Conv1D, nn.modules.conv._ConvNd)


@dataclass
class WeightCompander(Regularizer):
    """Weight compander (Cakaj, Mehnert and Yang 2023, arXiv 2306.16993): `w = a * arctan(v / b)`, and `v` learns.

    No weight leaves `a * pi / 2`, and steps of `v` move large weights less than small ones. Each matrix of a linear
    layer or a convolution that learns has its own `a` and `b`. At first both are `margin * 2 / pi * max |w|`, so that
    small weights move as they did, and `v = b * tan(w / a)`, so that training starts at the weights there are. A
    matrix of zeros, as LoRA begins with, has `a = b = 1`. Left alone are matrices that two layers share, embeddings,
    and matrices that lie in one parameter, as those of experts may. With LoRA it is A and B that are companded.

    The model is evaluated and saved with plain weights, and has them after training; `v`, `a` and `b` are in the
    state of checkpoints.

    Cost: no pass; an arctangent of each weight per use of it, forward and backward, and memory for both.

    Args:
        margin (`float`): how far above the largest weight the bound is at first, as a factor above 1.
        learned (`bool`): `a` and `b` learn too, through their logarithms, which weight decay draws to the start.

    Raises:
        ValueError: a setting out of range, or a model without matrices that the method can act on.
    """

    margin: float = 2.0
    learned: bool = True

    def __post_init__(self) -> None:
        if not 1 < self.margin < math.inf:
            raise ValueError(f"margin of WeightCompander must be above 1 and finite, got {self.margin!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        uses: Counter[Any] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
        learning = set(weights(model).values())
        modules: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _LAYERS) and module.weight in learning and uses[module.weight] == 1
        }
        if not modules:
            raise ValueError(
                f"WeightCompander has nothing to act on: no layer of {type(model).__name__} has a weight matrix of "
                "its own that learns."
            )
        self._layers = {name: (module, Compander(module.weight, self)) for name, module in modules.items()}
        for module, compander in self._layers.values():
            parametrize.register_parametrization(module, "weight", compander)

    def detach(self) -> None:
        """See `Regularizer`."""
        for module, _ in self._layers.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        self._layers = {}

    def finish(self) -> None:
        """See `Regularizer`: the weights are plain ones."""
        self.detach()

    @contextmanager
    def finished(self) -> Iterator[None]:
        """See `Regularizer`: the weights are plain ones, which stand in for those that learn."""
        with ExitStack() as stack:
            for module, _ in self._layers.values():
                stack.enter_context(_plain(module))
            yield

    def _originals(self) -> dict[str, torch.Tensor]:
        return {name: module.parametrizations.weight.original for name, (module, _) in self._layers.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        companders = {name: compander for name, (_, compander) in self._layers.items()}
        settings = {f"{name}.{key}": value for name, c in companders.items() for key, value in c.state_dict().items()}
        return settings | {f"{name}.v": original for name, original in self._originals().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`; after training there is nothing to take up, as the weights are plain."""
        for name, (_, compander) in self._layers.items():
            compander.load_state_dict({key: state[f"{name}.{key}"] for key in compander.state_dict()})
        with torch.no_grad():
            for name, original in self._originals().items():
                original.copy_(state[f"{name}.v"])


@contextmanager
def _plain(module: Any) -> Iterator[None]:
    """Context in which a companded module is what it was before, with the weights of now.

    Removing the parametrization would give the parameter that learns another storage, after which training under
    DistributedDataParallel goes wrong.
    """
    companded, weight = type(module), nn.Parameter(module.weight.detach())
    parametrizations = module._modules.pop("parametrizations")
    module.__class__ = companded.__bases__[0]
    module.register_parameter("weight", weight)
    try:
        yield
    finally:
        del module.weight
        module.__class__ = companded
        module.register_module("parametrizations", parametrizations)


class Compander(nn.Module):
    """`a * arctan(v / b)` of one matrix; `a` and `b` are float32.

    Args:
        weight (`torch.Tensor`): the weights to start at.
        method (`WeightCompander`): its settings.
    """

    start: torch.Tensor

    def __init__(self, weight: torch.Tensor, method: WeightCompander) -> None:
        super().__init__()
        largest = weight.detach().abs().max().float()
        start = torch.where(largest > 0, method.margin * 2 / math.pi * largest, 1.0)
        self.register_buffer("start", start)
        self.log_a = nn.Parameter(torch.zeros_like(start), requires_grad=method.learned)
        self.log_b = nn.Parameter(torch.zeros_like(start), requires_grad=method.learned)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """The weights."""
        a, b = self.start * self.log_a.exp(), self.start * self.log_b.exp()
        return (a * torch.atan(precise(v) / b)).to(v.dtype)

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """What learns in place of weights."""
        a, b = self.start * self.log_a.exp(), self.start * self.log_b.exp()
        return (b * torch.tan(precise(weight) / a)).to(weight.dtype)
