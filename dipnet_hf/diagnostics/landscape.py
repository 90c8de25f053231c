"""The loss along a line between two networks, and on a plane around one."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .predictions import Batch, scores
from .weight_changes import WeightChange, changed_weights


def loss_plane(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Batch],
    steps: Sequence[float],
    seed: int = 0,
) -> list[list[float]]:
    """Measure the mean loss at `w + a * d1 + b * d2` for a and b of `steps`; rows are of one a.

    The directions are random and filter-normalized (Li et al. 2018, arXiv 1712.09913): each row of a weight's
    direction is as long as that row of the weight, and parameters of one dimension do not move. So planes of networks
    whose weights differ in size can be compared. Costs `len(steps) ** 2` passes, and the memory of the chosen
    parameters once more; they are bit-equal afterwards.

    Args:
        model (`nn.Module`): as for `lipschitz_constants`.
        parameters (`Iterable[nn.Parameter]`): those of the model that move.
        batches (`Iterable[Mapping]`): model inputs with `labels`.
        steps (`Sequence[float]`): 1 is as far as the weights are from zero.
        seed (`int`): of the directions.

    Raises:
        ValueError: no parameter has two dimensions, or one is of integers; no labels.
    """
    parameters, batches = list(parameters), list(batches)
    if not any(parameter.dim() > 1 for parameter in parameters):
        raise ValueError("A plane needs a parameter of two dimensions or more: give the weights that were trained.")

    def moved(a: float, b: float) -> WeightChange:
        def move(number: int, weight: torch.Tensor) -> torch.Tensor:
            if weight.dim() < 2:
                return weight
            first, second = (_filter_normalized(weight, seed, number, direction) for direction in range(2))
            return weight + a * first + b * second

        return move

    def loss_at(a: float, b: float) -> float:
        with changed_weights(parameters, moved(a, b)):
            return scores(model, batches).nll

    return [[loss_at(a, b) for b in steps] for a in steps]


def _filter_normalized(weight: torch.Tensor, seed: int, number: int, direction: int) -> torch.Tensor:
    """A parameter's direction, drawn again at each point so that it need not be kept."""
    # Far apart for neighbours: generators of nearby seeds are independent, but those of equal ones are the same.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + direction)
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    norms = [tensor.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1)) for tensor in (weight, drawn)]
    return drawn * norms[0] / norms[1]


def loss_line(
    model: nn.Module, end: Mapping[str, torch.Tensor], batches: Iterable[Batch], fractions: Sequence[float]
) -> list[float]:
    """Measure the mean loss at `(1 - t) * w + t * end` for each t of `fractions`.

    Args:
        model (`nn.Module`): where the line begins, t = 0. Merge an adapter first: it is the network's weights that
            lie on a line, not their factors.
        end (`Mapping[str, torch.Tensor]`): the parameters at t = 1, by the names of `model.named_parameters()`.
        batches (`Iterable[Mapping]`): model inputs with `labels`.
        fractions (`Sequence[float]`): one pass each; beyond 0 and 1 the line goes on.

    Raises:
        ValueError: the networks differ in the names or shapes of their parameters; no labels.
    """
    own, batches = dict(model.named_parameters()), list(batches)
    shapes = [{name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (own, end)]
    if differing := sorted(name for name in own.keys() | end.keys() if shapes[0].get(name) != shapes[1].get(name)):
        raise ValueError(
            f"The networks differ in {len(differing)} parameters, such as {differing[0]}: merge both adapters first."
        )
    ends = [end[name] for name in own]

    def loss_at(t: float) -> float:
        with changed_weights(list(own.values()), lambda number, w: torch.lerp(w, ends[number].to(w), t)):
            return scores(model, batches).nll

    return [loss_at(t) for t in fractions]
