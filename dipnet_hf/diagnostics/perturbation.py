"""Changing what passes a place in a network: the output of the embeddings, or the input of a decoder layer.

Shape legend: B batch, L sequence, D hidden size. Inside `model.ensemble(k)` a place has k * B rows, sample by sample,
and what is added to a row is added to all its samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..architecture import decoder_layers, input_embedding, network_of, token_dims
from .predictions import Batch

EMBEDDINGS = "embeddings"
Change = Callable[[torch.Tensor], torch.Tensor]


def places(model: nn.Module) -> list[str]:
    """The places of a network: `"embeddings"`, `"layer 0"`, `"layer 1"` and so on."""
    return [EMBEDDINGS, *layer_places(model)]


def layer_places(model: nn.Module) -> list[str]:
    """The inputs of the decoder layers: `"layer 0"`, `"layer 1"` and so on."""
    return [f"layer {number}" for number in range(len(decoder_layers(network_of(model))))]


def check_places(model: nn.Module, wanted: Iterable[str]) -> None:
    """Refuse a place that the network does not have.

    Raises:
        ValueError: there is no such place; the message lists what there is.
    """
    known = places(model)
    if unknown := [place for place in wanted if place not in known]:
        raise ValueError(
            f"There is no place {unknown[0]!r}; there are {known[0]!r} and {known[1]!r} to {known[-1]!r}."
        )


@contextmanager
def changed_at(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Context in which what passes each of the given places is changed by its function.

    Raises:
        ValueError: there is no such place, or the model does not lay out its rows first.
    """
    network = network_of(model)
    check_places(model, changes)
    if token_dims(network) is not None:
        raise ValueError(f"{type(network).__name__} does not lay out its rows first, which the diagnostics need.")
    layers = decoder_layers(network)
    with ExitStack() as stack:
        for place, change in changes.items():
            if place == EMBEDDINGS:
                hook = input_embedding(network).register_forward_hook(_change_output(change))
            else:
                layer = layers[int(place.removeprefix("layer "))][1]
                hook = layer.register_forward_pre_hook(_change_input(change), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _change_output(change: Change) -> Callable:
    return lambda module, args, output: change(output)


def _change_input(change: Change) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


class Displacement:
    """What is added at one place, of shape `(B, L, D)`: zero at first, with a gradient, kept from pass to pass.

    Args:
        num_rows (`int`): B.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.value: torch.Tensor | None = None  # until the first pass tells L and D

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Add it to what passes."""
        if self.value is None:
            self.value = x.new_zeros(self.num_rows, *x.shape[1:]).requires_grad_()
        return x + over_samples(self.value, x)


def over_samples(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Repeat the rows of `value` for the samples of `x`."""
    return value.repeat(x.shape[0] // value.shape[0], 1, 1)


@torch.no_grad()
def typical_rms(model: nn.Module, batches: Iterable[Batch], wanted: Iterable[str]) -> dict[str, float]:
    """The size of what passes each place: the median over tokens of a token's RMS over channels.

    Not the RMS over all tokens: in a pretrained model that is the size of the first one, which is massive.
    """
    sizes: dict[str, list[torch.Tensor]] = {place: [] for place in wanted}

    def observer(place: str, batch: Batch) -> Change:
        def observe(x: torch.Tensor) -> torch.Tensor:
            mask = batch.get("attention_mask")
            rms_BL = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(-1).sqrt()
            rows = rms_BL if mask is None else rms_BL[over_samples(mask[..., None], x)[..., 0].bool()]
            sizes[place].append(rows.flatten().cpu())
            return x

        return observe

    for batch in batches:
        with changed_at(model, {place: observer(place, batch) for place in sizes}):
            model(**{name: value for name, value in batch.items() if name != "labels"})
    return {place: torch.cat(values).median().item() for place, values in sizes.items()}
