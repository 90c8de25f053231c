"""Expands a batch to S samples at the first noisy layer, so that the layers below run once, or else at the inputs.

Shape legend: S samples, B batch. Row s * B + b is sample s of row b.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .architecture import ROW_INPUTS, TEXT_INPUTS, needs_whole_rows, recomputes_without_hooks
from .contexts import PerThread

ONE_BY_ONE = "Draw the samples one by one (with DIPNet: model.sampling(seed))."
_LABELS = ("labels", "shift_labels")
Inputs = tuple[tuple, dict[str, Any]]  # of a model: positional and by keyword


@dataclass
class ExpandedPass(PerThread):
    """What is known of the forward pass that a thread runs now."""

    num_rows: int | None = None  # B while a forward pass runs that is expanded at the layers
    repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


@dataclass
class LateExpansion:
    """Repeats the rows of a forward pass, once per sample. The tuner calls `expand_at_layer` before every layer.

    Args:
        model (`nn.Module`): the network.
        layers (`list[nn.Module]`): its decoder layers from the first projected one on, see `architecture.layers_from`.
            If the list is empty, the rows are repeated at the inputs.
        num_samples (`int`): S.
    """

    model: nn.Module
    layers: list[nn.Module]
    num_samples: int
    _now: ExpandedPass = field(default_factory=ExpandedPass)

    def expand(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        """Expand the pass that begins now: at the layers if that is possible without gradients, else at the inputs.

        Raises:
            ValueError: the rows of an input cannot be repeated.
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
        if name == "position_ids" and value.dim() == 3:  # of shape (axes, B, L), for images within text
            return value.repeat(1, self.num_samples, 1)
        if value.shape[0] == self._now.num_rows:
            return self.repeat(value)
        if value.shape[0] == 1:
            return value
        raise ValueError(
            f"An ensemble repeats the rows of its inputs, but {name} of shape {tuple(value.shape)} does not have one "
            f"for each of the {self._now.num_rows} rows. {ONE_BY_ONE}"
        )

    def start(self, num_rows: int) -> None:
        """Expand the pass that begins now when it enters the layers."""
        self._now.num_rows, self._now.repeated = num_rows, {}

    def stop(self) -> None:
        """Forget the pass and its tensors; later passes are not expanded."""
        self._now.num_rows, self._now.repeated = None, {}

    def expand_copies(self, args: tuple, inputs: dict[str, Any]) -> Inputs | None:
        """Reduce S equal copies of the rows to the first one, for expansion at the layers; None if it is impossible.

        A backward pass may recompute the layers. Labels keep all rows, because the output has all rows.
        """
        if not self.layers or args or not self._are_copies(inputs) or needs_whole_rows(self.model, inputs):
            return None
        # A layer that is recomputed without the hooks would get its input without the expansion.
        if recomputes_without_hooks(self.model, self.layers):
            return None
        name = next(name for name in ROW_INPUTS if inputs.get(name) is not None)
        num_rows = inputs[name].shape[0] // self.num_samples
        self.start(num_rows)
        first = dict(inputs)
        for name in ROW_INPUTS:
            if isinstance(inputs.get(name), torch.Tensor):
                first[name] = inputs[name][:num_rows]
        return (), first

    @staticmethod
    def _are_copies(inputs: dict[str, Any]) -> bool:
        """Whether every input is known to hold the copies in its rows, unlike images and boundaries of sequences."""
        if torch.compiler.is_compiling() or all(inputs.get(name) is None for name in TEXT_INPUTS):
            return False
        others = [value for name, value in inputs.items() if name not in (*ROW_INPUTS, *_LABELS)]
        if any(isinstance(value, torch.Tensor) and value.dim() > 0 for value in others):
            return False
        positions = inputs.get("position_ids")
        return positions is None or positions.dim() < 3

    def repeat(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat the rows sample by sample. Layers share tensors, so each is repeated once per forward pass."""
        if self.num_samples == 1:
            return value
        known = self._now.repeated
        if id(value) not in known:
            repeated = value.repeat(self.num_samples, *[1] * (value.dim() - 1))
            known[id(value)] = (value, repeated)  # the tensor too, because a freed tensor's id may be used again
        return known[id(value)][1]

    def expand_at_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Inputs | None:
        """Repeat what a layer gets with B rows: masks, rotations and, in the first layer, the hidden states."""
        if self._now.num_rows is None or layer not in self.layers:
            return None
        repeated = {name: self._repeat_nested(value) for name, value in kwargs.items()}
        return tuple(map(self._repeat_nested, args)), repeated

    def _repeat_nested(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._repeat_nested, value))
        # Rotations of shape (L, head_dim) have no rows; masks and positions of shape (B, L) do.
        min_dim = 3 if isinstance(value, torch.Tensor) and value.is_floating_point() else 2
        if isinstance(value, torch.Tensor) and value.dim() >= min_dim and value.shape[0] == self._now.num_rows:
            return self.repeat(value)
        return value
