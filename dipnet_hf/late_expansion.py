"""Expands a batch to S samples at the first noisy layer instead of at the model's inputs; layers below run once.

Shape legend: S samples, B batch. Row s * B + b is sample s of row b.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .architecture import (
    ROW_INPUTS,
    TEXT_INPUTS,
    layers_take_more_rows,
    needs_whole_rows,
    recomputes_without_hooks,
)

_LABELS = ("labels", "shift_labels")


class LateExpansion:
    """Repeats the rows of a forward pass, once per sample, at the first of some decoder layers.

    Args:
        model (`nn.Module`): the network.
        layers (`list[nn.Module]`): its decoder layers from the first projected one on; may be empty.
        num_samples (`int`): S.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module], num_samples: int) -> None:
        self._model = model
        self._layers = layers if layers_take_more_rows(model, layers) else []
        self._num_samples = num_samples
        self._num_rows: int | None = None  # B while a forward pass runs that is expanded at the layers
        self._repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook on to the layers, before the noise does."""
        hooks = [
            layer.register_forward_pre_hook(self._expand_at_layer, prepend=True, with_kwargs=True)
            for layer in self._layers
        ]
        try:
            yield
        finally:
            self.stop()
            for hook in hooks:
                hook.remove()

    def is_possible(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward pass with these inputs can be expanded at the layers."""
        return bool(self._layers) and not needs_whole_rows(self._model, inputs)

    def is_possible_in_training(self, inputs: dict[str, Any]) -> bool:
        """As `is_possible`, for inputs of S equal copies and a backward pass that may recompute the layers."""
        if torch.compiler.is_compiling() or all(inputs.get(name) is None for name in TEXT_INPUTS):
            return False
        others = [value for name, value in inputs.items() if name not in (*ROW_INPUTS, *_LABELS)]
        if any(isinstance(value, torch.Tensor) and value.dim() > 0 for value in others):
            return False  # images, boundaries of packed sequences: not known to be copies by rows
        positions = inputs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            return False
        # Recomputed without the hooks, a layer would be given its input before the expansion.
        return self.is_possible(inputs) and not recomputes_without_hooks(self._model, self._layers)

    def start(self, num_rows: int) -> None:
        """Expand the pass that begins now when it enters the layers."""
        self._num_rows, self._repeated = num_rows, {}

    def stop(self) -> None:
        """Let go of the pass's tensors; passes to come run as they are."""
        self._num_rows, self._repeated = None, {}

    def start_from_copies(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As `start`, from inputs of S equal copies, of which the first is kept.

        Labels, which are compared with the output, keep all.
        """
        name = next(name for name in ROW_INPUTS if inputs.get(name) is not None)
        num_rows = inputs[name].shape[0] // self._num_samples
        self.start(num_rows)
        return {
            name: value[:num_rows] if name in ROW_INPUTS and isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def repeat(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat rows sample by sample, each tensor once per forward pass."""
        if self._num_samples == 1:
            return value
        if id(value) not in self._repeated:
            repeated = value.repeat(self._num_samples, *[1] * (value.dim() - 1))
            self._repeated[id(value)] = (value, repeated)  # the tensor too, so that its id stays its own
        return self._repeated[id(value)][1]

    def _expand_at_layer(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Repeat what a layer is given for one row each: its input, if it is the first one, masks and rotations."""
        if self._num_rows is None:
            return None
        repeated = {name: self._repeat_nested(value) for name, value in kwargs.items()}
        return tuple(map(self._repeat_nested, args)), repeated

    def _repeat_nested(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._repeat_nested, value))
        # Rotations of shape (L, head_dim) have no rows; masks and positions of shape (B, L) do.
        min_dim = 3 if isinstance(value, torch.Tensor) and value.is_floating_point() else 2
        if isinstance(value, torch.Tensor) and value.dim() >= min_dim and value.shape[0] == self._num_rows:
            return self.repeat(value)
        return value
