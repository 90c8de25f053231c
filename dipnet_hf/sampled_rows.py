"""One forward pass of S samples of a network at once: the rows are repeated, and the samples' logits combined.

Rows are repeated inside the model and combined before its output leaves it, so that `forward` and `generate` keep
their shapes. How the samples differ is said elsewhere: by DIPNet's noise in `ensemble.py`, by other methods in
`regularizers/samples.py`.

Shape legend: S samples, B batch, L sequence, V vocabulary. Row s * B + b is sample s of row b.
"""

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import StaticCache
from transformers.generation import GenerationConfig, GenerationMode

from .architecture import (
    RECURRENT_STATES,
    TEXT_INPUTS,
    context_length,
    is_encoder_decoder,
    setting,
    shifts_labels,
    text_config,
)
from .contexts import PerThread
from .late_expansion import ONE_BY_ONE, LateExpansion

_CACHES = (None, "dynamic", "offloaded")


@dataclass
class SampledPass(PerThread):
    """What is known of the forward pass that a thread runs now."""

    num_rows: int | None = None  # B while a forward pass of the samples runs
    length: int | None = None  # L, where there are tokens
    labels: dict[str, Any] = field(default_factory=dict)


class Repeated(NamedTuple):
    """The inputs of one forward pass, repeated, and what is known of its tokens; None where it has none."""

    inputs: dict[str, Any]
    num_rows: int  # B
    tokens: torch.Tensor | None  # ids or embeddings of the B rows
    positions_BL: torch.Tensor | None  # or (1, L) if they are the same in all rows


class SampledRows:
    """Runs `num_samples` samples of a network on every row, and returns what `combine` makes of them.

    Args:
        model (`nn.Module`): the network itself.
        num_samples (`int`): S.
        combine (`Callable`): logits of shape `(S, B, ...)` to what the model returns instead.
        seed (`int`): which samples.
        layers (`Sequence[nn.Module]`): see `LateExpansion`; without any the rows are repeated at the inputs.

    Raises:
        ValueError: an argument out of range, or an encoder-decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        num_samples: int,
        combine: Callable[[torch.Tensor], torch.Tensor],
        seed: int,
        layers: Sequence[nn.Module] = (),
    ) -> None:
        check_samples(num_samples, seed)
        if is_encoder_decoder(model):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, which an ensemble does not support. {ONE_BY_ONE}"
            )
        self.model: Any = model
        self.shifts_labels = shifts_labels(model)
        self.num_samples = int(num_samples)
        self.seed = int(seed)
        self.combine = combine
        self.expansion = LateExpansion(model, list(layers), self.num_samples)
        self._now = SampledPass()

    @property
    def num_rows(self) -> int | None:
        """B while this thread runs a forward pass of the samples, None outside."""
        return self._now.num_rows

    # ---- into the model ----

    def repeat(self, kwargs: dict[str, Any]) -> Repeated:
        """Begin a forward pass: repeat its inputs once per sample, or leave that to the layers, see `LateExpansion`.

        Raises:
            ValueError: an input that cannot be repeated, an empty or too long prompt, a cache from elsewhere, or an
                output that has no mean.
        """
        self.stop()  # the pass before may have failed
        inputs = dict(kwargs)
        names = (*TEXT_INPUTS, getattr(self.model, "main_input_name", ""), *inputs)
        name = next((name for name in names if isinstance(inputs.get(name), torch.Tensor)), None)
        if name is None:
            raise ValueError(f"An ensemble repeats the rows of a tensor, and the inputs {list(inputs)} hold none.")
        main = inputs[name]
        self._now.num_rows = num_rows = main.shape[0]
        check_prompt(main)
        self._check_inputs(inputs, main)
        self._now.labels = self._pop_labels(inputs)
        self._mark(inputs.get("past_key_values"))
        tokens = main if name in TEXT_INPUTS else None
        positions_BL = self._now.length = None
        if tokens is not None:
            self._now.length = tokens.shape[1]
            positions_BL = self._positions(inputs, tokens)
            self._check_positions(positions_BL, padded=inputs.get("attention_mask") is not None)
        return Repeated(self.expansion.expand(inputs, num_rows), num_rows, tokens, positions_BL)

    def _positions(self, inputs: dict[str, Any], main: torch.Tensor) -> torch.Tensor:
        """Every token's position in its own sequence, of shape `(B, L)` or `(1, L)`: padding does not count."""
        length = main.shape[1]
        position_ids, mask, cache = (inputs.get(n) for n in ("position_ids", "attention_mask", "past_key_values"))
        if position_ids is not None and position_ids.dim() == 2:
            return position_ids
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        past_length = 0 if cache is None else cache.get_seq_length()
        return torch.arange(past_length, past_length + length, device=main.device)[None]

    # ---- out of the model ----

    def end(self, output: Any) -> Any:
        """End the pass: combine the samples' logits, and compute the loss of the result; None where none has begun."""
        if self._now.num_rows is None:
            return None
        rows = self.num_samples * self._now.num_rows
        self.stop()
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
        self._mark(getattr(output, "past_key_values", None))
        if logits is None:
            raise ValueError(f"An ensemble averages logits, and {type(self.model).__name__} returns none.")
        if logits.shape[0] != rows:
            raise ValueError(
                f"{type(self.model).__name__} returned {logits.shape[0]} rows of logits for {rows} of input."
            )
        logits = self.combine(logits.unflatten(0, (self.num_samples, -1)))
        loss = self._loss(logits)
        if isinstance(output, tuple):
            return (logits, *output[1:]) if loss is None else (loss, logits, *output[1:])
        if loss is None:
            output.logits = logits
            return output
        return type(output)(**{**output, "logits": logits, "loss": loss})

    def _mark(self, cache: Any) -> None:
        """Note on a cache which samples fill it; a copy of it keeps that."""
        if cache is not None and not isinstance(cache, tuple):
            cache.dip_samples = (self.seed, self.num_samples)

    def stop(self) -> None:
        """Forget this thread's forward pass and its tensors."""
        self._now.num_rows = None
        self.expansion.stop()

    def _pop_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take what the loss needs out of the inputs: it is that of the result, not of the samples."""
        if inputs.get("labels") is None:
            return {}
        if not self.shifts_labels:
            raise ValueError(
                f"An ensemble of {type(self.model).__name__} takes no labels: compute the loss from its logits."
            )
        return {name: inputs.pop(name) for name in ("labels", "shift_labels", "num_items_in_batch") if name in inputs}

    def _loss(self, logits: torch.Tensor) -> torch.Tensor | None:
        if not self._now.labels:
            return None
        vocab_size = text_config(self.model).vocab_size
        return self.model.loss_function(logits=logits, vocab_size=vocab_size, **self._now.labels)

    # ---- checks ----

    def _check_inputs(self, inputs: dict[str, Any], main: torch.Tensor) -> None:
        if packed := [name for name in inputs if name.startswith("cu_seq_lens") and inputs[name] is not None]:
            raise ValueError(f"An ensemble takes padded batches, not sequences packed into one row ({packed[0]}).")
        for name in ("output_hidden_states", "output_attentions"):
            if inputs.get(name) or setting(self.model, name):
                raise ValueError(
                    f"{name} is not available in an ensemble: each of the samples has its own. {ONE_BY_ONE}"
                )
        if states := [name for name in RECURRENT_STATES if inputs.get(name) is not None]:
            raise ValueError(
                f"{type(self.model).__name__} keeps {states[0]}, which tells no position: use_cache=False."
            )
        cache = inputs.get("past_key_values")
        if isinstance(cache, StaticCache):
            raise ValueError("A static cache is not supported in an ensemble: use DynamicCache().")
        keys = getattr(next(iter(reversed(getattr(cache, "layers", []))), None), "keys", None)
        if keys is None or not keys.numel():
            return
        self.check_cache_is_usable()
        rows = self.num_samples * main.shape[0]
        if keys.shape[0] != rows:
            raise ValueError(
                f"past_key_values holds {keys.shape[0]} rows, and {self.num_samples} samples of {main.shape[0]} "
                f"prompts need {rows}: a cache must be filled within the same ensemble."
            )
        if (filled := getattr(cache, "dip_samples", None)) != (self.seed, self.num_samples):
            how = "without an ensemble" if filled is None else f"with seed={filled[0]}, num_samples={filled[1]}"
            raise ValueError(
                f"past_key_values was filled {how}, and this ensemble has seed={self.seed}, "
                f"num_samples={self.num_samples}: a cache must be filled within the same ensemble."
            )

    def check_cache_is_usable(self) -> None:
        """Refuse cached tokens where the samples differ in a way that cannot do with them."""

    def _check_positions(self, positions_BL: torch.Tensor, padded: bool) -> None:
        if positions_BL.shape[1] == 1:  # a step of decoding
            return
        if not padded and (positions_BL.diff() != 1).any():
            raise ValueError("An ensemble takes padded batches with their mask, not sequences packed by position_ids.")
        context = context_length(self.model)
        last = int(positions_BL.max())
        if context is not None and last >= context:
            raise ValueError(
                f"The prompt has {last + 1} tokens, more than the {context} of the model's context: cut it."
            )

    def check_generation(self, mode: GenerationMode, config: GenerationConfig) -> None:
        """Refuse what would mix up the samples, before the generation starts."""
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"An ensemble chooses one token at a time, greedily or by sampling; got {mode.value}. Set num_beams=1 "
                "and leave out assistant_model, prompt_lookup_num_tokens and the like."
            )
        if config.use_cache:
            self.check_cache_is_usable()
        if config.cache_implementation not in _CACHES:
            raise ValueError(
                f"An ensemble supports the caches {_CACHES}, got cache_implementation={config.cache_implementation!r}."
            )


def check_samples(num_samples: Any, seed: Any) -> None:
    """Refuse a number of samples or a seed that is none."""
    if not is_integer(num_samples) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer of at least 1, got {num_samples!r}.")
    if not is_integer(seed):
        raise ValueError(f"seed must be an integer, got {seed!r}.")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, one of numpy's too; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_prompt(prompt: torch.Tensor | None) -> None:
    """Refuse a prompt without tokens; where there is none at all, the model has one."""
    if prompt is not None and prompt.dim() > 1 and prompt.shape[1] == 0:
        raise ValueError(f"The prompt is empty, of shape {tuple(prompt.shape)}: give at least one token, such as bos.")
