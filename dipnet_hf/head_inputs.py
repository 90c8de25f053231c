"""Takes the hidden states before a causal language model's output head, in a forward pass without its logits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .chunked_loss import OutputHead

# Factors of the logits by the names that configurations give them, and whether they multiply or divide.
_FACTOR_POWERS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_NUM_COMPARED = 8  # more than one: a padding token's embedding may be zero


class HeadInputs:
    """Gives the hidden states of a forward pass to whoever computes the loss from them. The head sees no token then.

    Args:
        model (`nn.Module`): the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._known: bool | None = None  # whether `OutputHead` gives the model's logits; None until compared
        self._taken: tuple[torch.Tensor, OutputHead] | None = None

    @contextmanager
    def taken(self, rows_and_length: torch.Size) -> Iterator[None]:
        """In this context's forward pass, take the hidden states of shape `(*rows_and_length, D)` in place of logits.

        Nothing is taken, and the logits are complete, where the head is not a plain linear layer (an adapter is on it,
        it is quantized or sharded), in a compiled model, and where `compare_once` found other logits.
        """
        head = self._plain_head()
        if head is None or not self._known:
            yield
            return

        def take(module: nn.Linear, args: tuple) -> tuple | None:
            if torch.compiler.is_compiling() or self._taken is not None or args[0].shape[:-1] != rows_and_length:
                return None
            self._taken = args[0].to(module.weight.device), self._output_head(module)
            return (args[0][:, :0], *args[1:])

        hook = head.register_forward_pre_hook(take)
        try:
            yield
        finally:
            hook.remove()
            self._taken = None

    def pop(self) -> tuple[torch.Tensor, OutputHead] | None:
        """The hidden states of shape `(rows, L, D)` and the head of this context's pass, if they were taken."""
        taken, self._taken = self._taken, None
        return taken

    def _plain_head(self) -> nn.Linear | None:
        head = self._model.get_output_embeddings() if isinstance(self._model, PreTrainedModel) else None
        if type(head) is not nn.Linear or head.weight.is_meta or head._forward_hooks:
            return None
        is_whole = head.weight.shape == (head.out_features, head.in_features)
        return head if is_whole and not isinstance(head.weight, DTensor) else None

    def _output_head(self, head: nn.Linear) -> OutputHead:
        config = self._model.config.get_text_config()
        factors = {name: getattr(config, name, None) for name in _FACTOR_POWERS}
        scales = [factor ** _FACTOR_POWERS[name] for name, factor in factors.items() if factor is not None]
        device_type = head.weight.device.type
        autocast = torch.is_autocast_enabled(device_type)
        return OutputHead(
            weight_VD=head.weight,
            bias_V=head.bias,
            dtype=torch.get_autocast_dtype(device_type) if autocast else head.weight.dtype,
            scale=scales[0] if scales else 1.0,
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def compare_once(self) -> None:
        """Find out, in a forward pass of a few tokens, whether `OutputHead` gives the model's logits; warn if not."""
        head = self._plain_head()
        if head is None or self._known is not None:
            return
        inputs: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        embeddings = self._model.get_input_embeddings().weight
        input_ids = torch.arange(min(len(embeddings), _NUM_COMPARED), device=embeddings.device)[None]
        devices = [embeddings.device] if embeddings.is_cuda else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a reentrant checkpoint asks for gradients
                logits = self._model(input_ids=input_ids).logits
                ours = [self._output_head(head).logits(hidden.to(head.weight.device)) for hidden in inputs]
        finally:
            hook.remove()
        tolerance = 1e-4 if head.weight.dtype == torch.float32 and logits.dtype == torch.float32 else 2e-2
        self._known = len(ours) == 1 and bool((ours[0].to(logits) - logits).norm() <= tolerance * logits.norm())
        if not self._known:
            warnings.warn(
                f"The logits of {type(self._model).__name__} are not the plain output of its head, so the loss is "
                "computed from all of them at once, which takes more memory.",
                stacklevel=2,
            )
