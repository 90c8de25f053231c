"""Takes the hidden states before a causal language model's output head, in a forward pass without its logits."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .chunked_loss import OutputHead

# Factors of the logits by the names that configurations give them, and whether they multiply or divide.
_FACTOR_POWERS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_NUM_COMPARED = 8  # more than one: a padding token's embedding may be zero


class Comparison(NamedTuple):
    """What one forward pass of a few tokens told of a model in a state."""

    state: tuple
    logits_are_plain: bool = False  # `OutputHead` gives the model's logits
    loss_is_plain: bool = False  # the model's own loss is the shifted cross entropy, averaged over the tokens


class HeadInputs:
    """Gives the hidden states of a forward pass to whoever computes the loss from them. The head sees no token then.

    Args:
        model (`nn.Module`): the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._compared: Comparison | None = None
        self._taken: tuple[torch.Tensor, OutputHead] | None = None

    @contextmanager
    def taken(self, rows_and_length: torch.Size) -> Iterator[None]:
        """In this context's forward pass, take the hidden states of shape `(*rows_and_length, D)` in place of logits.

        Nothing is taken, and the logits are complete, where the head is not a plain linear layer (an adapter is on it,
        it is quantized or sharded), in a compiled model, and where `compare` found other logits.
        """
        head = self._plain_head()
        if head is None or not self.compare().logits_are_plain:
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
        if type(head) is not nn.Linear or head._forward_hooks or not _is_whole(head.weight):
            return None
        return head if head.weight.shape == (head.out_features, head.in_features) else None

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

    def compare(self) -> Comparison:
        """Find out, in a forward pass of a few tokens, what `Comparison` tells; once, and again after a change.

        A warning says so if the head is a plain one and its logits are not. A sharded model is not asked.
        """
        head = self._plain_head()
        state = self._state(head)
        if self._compared is None or self._compared.state != state:
            embeddings: Any = getattr(self._model.get_input_embeddings(), "weight", None)
            can_run = isinstance(embeddings, torch.Tensor) and embeddings.dim() == 2 and _is_whole(embeddings)
            self._compared = self._compare(head, embeddings) if can_run else Comparison(state)
            if can_run and head is not None and not self._compared.logits_are_plain:
                warnings.warn(
                    f"The logits of {type(self._model).__name__} are not the plain output of its head, so the loss "
                    "is computed from all of them at once, which takes more memory.",
                    stacklevel=2,
                )
        return self._compared

    def _state(self, head: nn.Linear | None) -> tuple:
        """What may be replaced between two forward passes: the head's computation and the model's loss function."""
        return None if head is None else head.forward, vars(self._model).get("_loss_function")

    def _compare(self, head: nn.Linear | None, embeddings: torch.Tensor) -> Comparison:
        inputs: list[torch.Tensor] = []
        hook = None if head is None else head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        ids = torch.arange(min(len(embeddings), _NUM_COMPARED), device=embeddings.device)
        labels = ids.square() % len(ids)  # neither the next token nor the same one
        try:
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[embeddings.device] if embeddings.is_cuda else []),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")  # a reentrant checkpoint asks for gradients
                outputs = self._model(input_ids=ids[None], labels=labels[None])
                heads = [self._output_head(head) for _ in inputs] if head is not None else []
                ours = [h.logits(x.to(h.weight_VD.device)) for h, x in zip(heads, inputs, strict=True)]
        finally:
            if hook is not None:
                hook.remove()
        logits = outputs.logits
        plain_loss = F.cross_entropy(logits[0, :-1].float(), labels[1:].to(logits.device))
        is_precise = logits.dtype == torch.float32
        return Comparison(
            self._state(head),
            len(ours) == 1 and _are_close(ours[0].to(logits.device), logits.float(), 1e-4 if is_precise else 1e-2),
            outputs.loss is not None and _are_close(outputs.loss.to(plain_loss), plain_loss, 1e-5),
        )


def _is_whole(weight: torch.Tensor) -> bool:
    return not weight.is_meta and weight.numel() > 0 and not isinstance(weight, DTensor)


def _are_close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether all entries agree; infinite ones, of a mask, agree with nothing."""
    return bool(torch.isfinite(b).all()) and torch.allclose(a, b, rtol=tolerance, atol=1e-5)
