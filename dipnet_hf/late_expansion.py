"""Expands a batch to S samples at the first noisy layer, so that the layers below run once, or else at the inputs.

Shape legend: S samples, B batch. Row s * B + b is sample s of row b.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .architecture import ROW_INPUTS, TEXT_INPUTS, needs_whole_rows, recomputes_without_hooks

_LABELS = ("labels", "shift_labels")
Inputs = tuple[tuple, dict[str, Any]]  # of a model: positional and by keyword


@dataclass
class LateExpansion:
    """Repeats the rows of a forward pass, once per sample.

    Args:
        model (`nn.Module`): the network.
        layers (`list[nn.Module]`): its decoder layers from the first projected one on, see `architecture.layers_from`.
            Without any, the rows are repeated at the inputs.
        num_samples (`int`): S.
    """

    model: nn.Module
    layers: list[nn.Module]
    num_samples: int
    _num_rows: int | None = None  # B while a forward pass runs that is expanded at the layers
    _repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook on to the layers, before the noise does."""
        hooks = [
            layer.register_forward_pre_hook(self._expand_at_layer, prepend=True, with_kwargs=True)
            for layer in self.layers
        ]
        try:
            yield
        finally:
            self.stop()
            for hook in hooks:
                hook.remove()

    def expand(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        """Expand the pass that begins now: without gradients at the layers if that can be, else these inputs.

        Raises:
            ValueError: an input whose rows cannot be repeated.
        """
        self.start(num_rows)
        if self.layers and not torch.is_grad_enabled() and not needs_whole_rows(self.model, inputs):
            return inputs
        expanded = {name: self._expand_input(name, value) for name, value in inputs.items()}
        self.stop()
        return expanded

    def _expand_input(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        if name == "position_ids" and value.dim() == 3:  # of several axes, for images within text
            return value.repeat(1, self.num_samples, 1)
        if value.shape[0] == self._num_rows:
            return self.repeat(value)
        if value.shape[0] == 1:
            return value
        raise ValueError(
            f"An ensemble repeats the rows of its inputs, and {name} of shape {tuple(value.shape)} does not have one "
            f"for each of the {self._num_rows} rows. Draw the samples one by one with model.sampling(seed)."
        )

    def start(self, num_rows: int) -> None:
        """Expand the pass that begins now when it enters the layers."""
        self._num_rows, self._repeated = num_rows, {}

    def stop(self) -> None:
        """Let go of the pass's tensors; passes to come run as they are."""
        self._num_rows, self._repeated = None, {}

    def expand_copies(self, args: tuple, inputs: dict[str, Any]) -> Inputs | None:
        """Keep the first of S equal copies of the rows, and expand it at the layers; None where that cannot be.

        A backward pass may recompute the layers. Labels, which are compared with the output, keep all rows.
        """
        self.stop()  # a pass that failed
        if not self.layers or args or not self._are_copies(inputs) or needs_whole_rows(self.model, inputs):
            return None
        # Recomputed without the hooks, a layer would be given its input before the expansion.
        if recomputes_without_hooks(self.model, self.layers):
            return None
        name = next(name for name in ROW_INPUTS if inputs.get(name) is not None)
        num_rows = inputs[name].shape[0] // self.num_samples
        self.start(num_rows)
        first = {
            name: value[:num_rows] if name in ROW_INPUTS and isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        return (), first

    @staticmethod
    def _are_copies(inputs: dict[str, Any]) -> bool:
        """Whether every input is known to hold its copies by rows; images and boundaries of sequences are not."""
        if torch.compiler.is_compiling() or all(inputs.get(name) is None for name in TEXT_INPUTS):
            return False
        others = [value for name, value in inputs.items() if name not in (*ROW_INPUTS, *_LABELS)]
        if any(isinstance(value, torch.Tensor) and value.dim() > 0 for value in others):
            return False
        positions = inputs.get("position_ids")
        return positions is None or positions.dim() < 3

    def repeat(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat rows sample by sample, each tensor once per forward pass."""
        if self.num_samples == 1:
            return value
        if id(value) not in self._repeated:
            repeated = value.repeat(self.num_samples, *[1] * (value.dim() - 1))
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
