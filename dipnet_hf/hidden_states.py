"""Captures what enters a causal language model's output head, so that its loss can be computed without logits."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .architecture import ModelProbe, output_head, plain_head, probe
from .chunked_loss import OutputHead
from .contexts import PerThread
from .sharding import is_sharded, whole


@dataclass
class Captured(PerThread):
    """What a thread has captured, and whether it captures."""

    wanted: bool = False
    states: tuple[torch.Tensor, OutputHead, nn.Linear] | None = None


class HiddenStateCapture:
    """Captures the hidden states that a forward pass gives to the output head, and gives the head no token instead.

    Args:
        model (`nn.Module`): the network.
        without_noise (`Callable`): gives a context without noise, in which the model is probed.
    """

    def __init__(self, model: nn.Module, without_noise: Callable[[], AbstractContextManager[None]]) -> None:
        self._model: Any = model
        self._without_noise = without_noise
        self._probed: tuple[tuple, ModelProbe] | None = None
        self._captured = Captured()

    @contextmanager
    def capturing(self, rows_and_length: torch.Size) -> Iterator[None]:
        """In this context's forward pass, in this thread, capture the hidden states of shape `(*rows_and_length, D)`.

        Nothing is captured, and the logits are complete, if the head is not a plain linear layer (it has an adapter,
        is quantized or offloaded), if the model is compiled, or if its logits are not the head's plain output.
        """
        head = plain_head(self._model)
        if head is None or not self.probe().logits_are_plain:
            yield
            return

        def capture(module: nn.Linear, args: tuple) -> tuple | None:
            if torch.compiler.is_compiling() or not self._captured.wanted or args[0].shape[:-1] != rows_and_length:
                return None
            if self._captured.states is not None:
                return None
            self._captured.states = args[0].to(module.weight.device), output_head(self._model, module), module
            return (args[0][:, :0], *args[1:])

        hook = head.register_forward_pre_hook(capture)
        self._captured.wanted = True
        try:
            yield
        finally:
            hook.remove()
            self._captured.wanted, self._captured.states = False, None

    def pop(self) -> tuple[torch.Tensor, OutputHead] | None:
        """Take the hidden states, of shape `(rows, L, D)`, and their head; None if nothing was captured."""
        captured, self._captured.states = self._captured.states, None
        if captured is None:
            return None
        states, head, module = captured
        # What shards the model may have let go of the weight that the forward pass has used.
        bias_V = None if module.bias is None else whole(module.bias)
        return states, head._replace(weight_VD=whole(module.weight), bias_V=bias_V)

    def probe(self, wrapped: Callable[..., Any] | None = None) -> ModelProbe:
        """What a forward pass of a few tokens tells about the model. It runs once, and again if the model has changed.

        Warns if the head is a plain linear layer but the logits are not its plain output.

        Args:
            wrapped (`Callable`, *optional*): what calls a model that is sharded; without it that is not run.
        """
        head = plain_head(self._model)
        # What may be replaced between two forward passes: the head's computation and the model's loss function.
        state = None if head is None else head.forward, vars(self._model).get("_loss_function")
        if self._probed is None or self._probed[0] != state:
            run = wrapped if is_sharded(self._model) else self._model
            if run is None:
                return ModelProbe()
            with self._without_noise():
                found = probe(self._model, head, run)
            self._probed = state, found
            if found.has_run and head is not None and not found.logits_are_plain:
                warnings.warn(
                    f"The logits of {type(self._model).__name__} are not the plain output of its head, so the loss "
                    "is computed from all of them at once, which takes more memory.",
                    stacklevel=2,
                )
        return self._probed[1]
