"""The loss under disturbances of a stated size: noise in embeddings, layers and weights, and attacks on embeddings.

A radius is relative: at a place to its typical RMS (`perturbation.typical_rms`), in a weight to that tensor's RMS. The
same seed draws the same disturbances for every model of the same shapes.

Shape legend: B batch, L sequence, D hidden size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from .perturbation import EMBEDDINGS, Change, Displacement, changed_at, check_places, over_samples, typical_rms
from .predictions import Batch, TokenFigures, losses, standing_still, summarize, token_figures
from .weight_changes import changed_weights


class Robustness(NamedTuple):
    """What is left of a model's predictions at one radius: means over supervised tokens, and over draws of noise."""

    radius: float
    nll: float  # nats
    accuracy: float
    ece: float


def noise_robustness(
    model: nn.Module,
    batches: Iterable[Batch],
    radii: Sequence[float],
    places: Iterable[str] = (EMBEDDINGS,),
    num_draws: int = 1,
    seed: int = 0,
) -> list[Robustness]:
    """Add Gaussian noise at one or more places; its standard deviation is `radius` times the place's typical RMS.

    Args:
        model (`nn.Module`): as for `lipschitz_constants`; in an ensemble all samples get the same noise.
        batches (`Iterable[Mapping]`): model inputs with `labels`.
        radii (`Sequence[float]`): none negative; one pass per draw each.
        places (`Iterable[str]`): `"embeddings"`, `"layer n"`; `layer_places(model)` are all layers' inputs.
        num_draws (`int`): draws of the noise.
        seed (`int`): of the noise.

    Raises:
        ValueError: a radius is negative or not finite, there is no such place, no batch or no labels.
    """
    _check(radii, num_draws)
    batches, places = list(batches), list(places)
    check_places(model, places)
    with standing_still(model):
        sizes = typical_rms(model, batches, places)

        def noisy(radius: float, generator: torch.Generator) -> Iterator[TokenFigures]:
            for batch in batches:
                changes = {place: _noise(radius * sizes[place], len(batch["labels"]), generator) for place in places}
                with changed_at(model, changes):
                    yield token_figures(model, batch)

        return [_over_draws(radius, noisy, num_draws, seed) for radius in radii]


def _noise(std: float, num_rows: int, generator: torch.Generator) -> Change:
    def add(x: torch.Tensor) -> torch.Tensor:
        noise = std * torch.randn(num_rows, *x.shape[1:], generator=generator)
        return x + over_samples(noise.to(x), x)

    return add


def attack_robustness(
    model: nn.Module, batches: Iterable[Batch], radii: Sequence[float], num_steps: int = 1
) -> list[Robustness]:
    """Move the embeddings to where the loss is high, no channel by more than `radius` times their typical RMS.

    One step is FGSM (Goodfellow et al. 2015, arXiv 1412.6572): `radius * sign(gradient)`. More are PGD (Madry et al.
    2018, arXiv 1706.06083): steps of `2.5 * radius / num_steps`, cut off at the radius, from the undisturbed
    embeddings. The loss is that of the row's supervised tokens, whose embeddings are moved too. A step costs a forward
    and a backward pass.

    Args:
        model, batches, radii: as for `noise_robustness`.
        num_steps (`int`): at least 1.

    Raises:
        ValueError: as `noise_robustness`, or `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    _check(radii)
    batches = list(batches)
    with standing_still(model):
        size = typical_rms(model, batches, [EMBEDDINGS])[EMBEDDINGS]
        step = 1.0 if num_steps == 1 else 2.5 / num_steps
        return [
            Robustness(
                radius,
                *summarize([_attacked(model, batch, radius * size, step, num_steps) for batch in batches]),
            )
            for radius in radii
        ]


def _attacked(model: nn.Module, batch: Batch, radius: float, step: float, num_steps: int) -> TokenFigures:
    displacement = Displacement(len(batch["labels"]))
    with changed_at(model, {EMBEDDINGS: displacement}):
        for _ in range(num_steps if radius else 0):
            loss = losses(model, batch).sum()
            value = displacement.value
            assert value is not None  # the embeddings were passed
            (gradient,) = torch.autograd.grad(loss, value)
            moved = value.detach() + step * radius * gradient.sign()
            displacement.value = moved.clamp(-radius, radius).requires_grad_()
        return token_figures(model, batch)


def weight_robustness(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    batches: Iterable[Batch],
    radii: Sequence[float],
    num_draws: int = 1,
    seed: int = 0,
) -> list[Robustness]:
    """Add Gaussian noise to weights; its standard deviation is `radius` times the RMS of each tensor.

    The weights are bit-equal afterwards. Needs the memory of the chosen parameters once more.

    Args:
        parameters (`Iterable[nn.Parameter]`): those of the model that are disturbed.
        model, batches, radii, num_draws, seed: as for `noise_robustness`.

    Raises:
        ValueError: as `noise_robustness`, or there is no parameter, or one of integers.
    """
    _check(radii, num_draws)
    parameters, batches = list(parameters), list(batches)

    def noisy(radius: float, generator: torch.Generator) -> Iterator[TokenFigures]:
        def add(number: int, weight: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            return weight + radius * weight.square().mean().sqrt() * noise

        with changed_weights(parameters, add):
            for batch in batches:
                yield token_figures(model, batch)

    with standing_still(model):
        return [_over_draws(radius, noisy, num_draws, seed) for radius in radii]


def _over_draws(
    radius: float,
    measure: Callable[[float, torch.Generator], Iterable[TokenFigures]],
    num_draws: int,
    seed: int,
) -> Robustness:
    generator = torch.Generator().manual_seed(seed)
    drawn = [summarize(measure(radius, generator)) for _ in range(num_draws if radius else 1)]
    return Robustness(radius, *(sum(values) / len(drawn) for values in zip(*drawn, strict=True)))


def _check(radii: Sequence[float], num_draws: int = 1) -> None:
    if wrong := [radius for radius in radii if not 0 <= radius < math.inf]:
        raise ValueError(f"A radius must be a finite number of at least 0, got {wrong[0]}.")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
