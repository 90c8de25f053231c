"""Rows of a batch that are repeated once a sample at the first projected layer, so that what lies below runs once.

Shape legend: S samples, B batch. Row s * B + b is sample s of row b.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# What decoder layers are given that is one for all rows, or has a row for each in its first dimension. A layer that
# takes anything else (position biases, shared keys) is not entered: the rows are repeated at the model's inputs then.
_LAYER_PARAMETERS = {
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "past_key_values",
    "layer_past",
    "use_cache",
    "cache_position",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "output_router_logits",
    "kwargs",
}
# Models that give their layers' output the shape of their inputs' rows.
_FIXED_OUTPUT_SHAPE = {"gpt_bigcode"}
_ROW_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_LABELS = ("labels", "shift_labels")


class RowRepeater:
    """Repeats the rows of a forward pass at the first of some decoder layers.

    Args:
        model (`nn.Module`): the network.
        layers (`list[nn.Module]`): its decoder layers from the first projected one on; may be empty.
        num_samples (`int`): S.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module], num_samples: int) -> None:
        self._model = model
        can_enter = all(set(inspect.signature(layer.forward).parameters) <= _LAYER_PARAMETERS for layer in layers)
        self._layers = layers if can_enter and self._config("model_type") not in _FIXED_OUTPUT_SHAPE else []
        self._num_samples = num_samples
        self._num_rows: int | None = None  # B while a forward pass runs that repeats its rows at the layers
        self._repeated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook on to the layers, before the noise does."""
        hooks = [
            layer.register_forward_pre_hook(self._enter_layer, prepend=True, with_kwargs=True)
            for layer in self._layers
        ]
        try:
            yield
        finally:
            self.end_forward()
            for hook in hooks:
                hook.remove()

    def can_enter(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward pass with these inputs can repeat its rows at the layers."""
        whole_model = ("output_router_logits", "output_hidden_states", "output_attentions")
        needs_rows = any(inputs.get(name) or self._config(name) for name in whole_model)
        return bool(self._layers) and not needs_rows and self._config("_attn_implementation") != "flex_attention"

    def can_enter_in_training(self, inputs: dict[str, Any]) -> bool:
        """As `can_enter`, for inputs of S equal copies and a backward pass that may recompute the layers."""
        if torch.compiler.is_compiling() or all(inputs.get(name) is None for name in _ROW_INPUTS[:2]):
            return False
        others = [value for name, value in inputs.items() if name not in (*_ROW_INPUTS, *_LABELS)]
        if any(isinstance(value, torch.Tensor) and value.dim() > 0 for value in others):
            return False  # images, boundaries of packed sequences: not known to be copies by rows
        if any(inputs[name].dim() == 3 for name in ("position_ids",) if inputs.get(name) is not None):
            return False
        # Recomputed with its hooks, a layer would be given its input without the repetition.
        recomputed = any(getattr(module, "gradient_checkpointing", False) for module in self._model.modules())
        hooks_are_outside = "__call__" not in vars(GradientCheckpointingLayer) and all(
            isinstance(layer, GradientCheckpointingLayer) for layer in self._layers
        )
        return self.can_enter(inputs) and (hooks_are_outside or not recomputed)

    def _config(self, name: str) -> Any:
        return getattr(getattr(self._model, "config", None), name, None)

    def begin_forward(self, num_rows: int) -> None:
        """Repeat the rows of the pass that begins now when it enters the layers."""
        self._num_rows, self._repeated = num_rows, {}

    def end_forward(self) -> None:
        """Let go of the pass's tensors; passes to come run as they are."""
        self._num_rows, self._repeated = None, {}

    def first_copy(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Keep the first of S equal copies of the rows; labels, which are compared with the output, keep all."""
        name = next(name for name in _ROW_INPUTS if inputs.get(name) is not None)
        num_rows = inputs[name].shape[0] // self._num_samples
        self.begin_forward(num_rows)
        return {
            name: value[:num_rows] if name in _ROW_INPUTS and isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }

    def repeat(self, value: torch.Tensor) -> torch.Tensor:
        """Repeat rows sample by sample, each tensor once a forward pass."""
        if self._num_samples == 1:
            return value
        if id(value) not in self._repeated:
            repeated = value.repeat(self._num_samples, *[1] * (value.dim() - 1))
            self._repeated[id(value)] = (value, repeated)  # the tensor too, so that its id stays its own
        return self._repeated[id(value)][1]

    def _enter_layer(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Repeat what a layer is given for one row each: its input, if it is the first one, masks and rotations."""
        if self._num_rows is None:
            return None
        repeated = {name: self._repeat_tree(value) for name, value in kwargs.items()}
        return tuple(map(self._repeat_tree, args)), repeated

    def _repeat_tree(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._repeat_tree, value))
        # Rotations of shape (L, head_dim) have no rows; masks and positions of shape (B, L) do.
        min_dim = 3 if isinstance(value, torch.Tensor) and value.is_floating_point() else 2
        if isinstance(value, torch.Tensor) and value.dim() >= min_dim and value.shape[0] == self._num_rows:
            return self.repeat(value)
        return value
