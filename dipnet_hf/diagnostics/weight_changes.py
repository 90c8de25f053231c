"""A model whose weights are others for a moment, and its own again afterwards, bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

WeightChange = Callable[[int, torch.Tensor], torch.Tensor]


@contextmanager
def changed_weights(parameters: Sequence[nn.Parameter], change: WeightChange) -> Iterator[None]:
    """Context in which the n-th parameter holds `change(n, weight)`; needs the memory of the changed ones.

    Raises:
        ValueError: there is no parameter, or one of integers, as of a quantized base.
    """
    if not parameters:
        raise ValueError("There is no parameter to change: give those that were trained.")
    if kinds := {parameter.dtype for parameter in parameters if not parameter.is_floating_point()}:
        raise ValueError(f"Parameters of {', '.join(map(str, kinds))} cannot be moved: load them in float32.")
    originals = [parameter.data for parameter in parameters]
    try:
        for number, (parameter, original) in enumerate(zip(parameters, originals, strict=True)):
            parameter.data = change(number, original).to(original)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.data = original
