"""Inference with the mean of k noisy samples, Algorithm 2: one forward pass of k times the rows, averaged.

Rows are repeated inside the model and averaged before its output leaves it, so that `forward` and `generate` keep
their shapes. Where only the upper layers are projected, the rows are repeated there: what lies below runs once.

A token's noise is a pure function of (seed, site, sample, position), the same for all rows of a batch. So a cached
step, a pass over the whole sequence, another batch and another padding see the same k networks.

Shape legend: S samples, B batch, L sequence, V vocabulary. Row s * B + b is sample s of row b.
"""

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import StaticCache
from transformers.generation import GenerationConfig, GenerationMode

from .architecture import (
    RECURRENT_STATES,
    TEXT_INPUTS,
    context_length,
    is_encoder_decoder,
    layers_from,
    setting,
    shifts_labels,
    text_config,
)
from .contexts import PerThread
from .draws import PositionDraw, SiteDraw
from .late_expansion import Inputs, LateExpansion
from .layout import Layout, padding_mask
from .noise import locate, position_noises
from .projection import DipProjection
from .uncertainty import Prediction, predictive_entropies

_CACHES = (None, "dynamic", "offloaded")


def mean_prob(logits_SBLV: torch.Tensor) -> torch.Tensor:
    """Logits of the mean probability, 1/S sum_s p_s: a proper mixture. Of one sample the logits themselves.

    They are its logarithm plus the mean of the samples' logsumexp. So they stand on the level of the model's own
    logits, on which some logits processors depend: a repetition penalty multiplies negative ones and divides others.
    """
    if len(logits_SBLV) == 1:
        return logits_SBLV[0]
    first, *others = logits_SBLV
    level = first.float().logsumexp(-1, keepdim=True)
    total = first.float() - level
    for logits in others:
        norm = logits.float().logsumexp(-1, keepdim=True)
        total, level = torch.logaddexp(total, logits.float() - norm), level + norm
    num_samples = len(logits_SBLV)
    return (total - math.log(num_samples) + level / num_samples).to(first.dtype)


def mean_logit(logits_SBLV: torch.Tensor) -> torch.Tensor:
    """The mean of the logits: a geometric mean of the probabilities once it is normalized."""
    return logits_SBLV.float().mean(0).to(logits_SBLV.dtype)


AVERAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"prob": mean_prob, "logit": mean_logit}


@dataclass
class EnsemblePass(PerThread):
    """What is known of the forward pass that a thread runs now."""

    num_rows: int | None = None  # B while a forward pass of the ensemble runs
    labels: dict[str, Any] = field(default_factory=dict)


class Ensemble:
    """The `Pass` of `num_samples` samples per row, whose mean the model returns.

    Args:
        model (`nn.Module`): the network itself.
        projections (`list[DipProjection]`): the sites, in the order of the modules.
        num_samples (`int`): k.
        combine (`Callable`): logits of shape `(S, B, ...)` to what the model returns instead.
        seed (`int`): which k samples.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: list[DipProjection],
        num_samples: int,
        combine: Callable[[torch.Tensor], torch.Tensor],
        seed: int,
    ) -> None:
        if not is_integer(num_samples) or num_samples < 1:
            raise ValueError(f"num_samples must be an integer of at least 1, got {num_samples!r}.")
        if not is_integer(seed):
            raise ValueError(f"seed must be an integer, got {seed!r}.")
        if not projections:
            raise ValueError(
                "An ensemble needs the noise of a DIP adapter, and none is active: call set_adapter(name). "
                "A model that was merged or unloaded has none."
            )
        if is_encoder_decoder(model):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder, which an ensemble does not support. Draw the "
                "samples one by one with model.sampling(seed)."
            )
        self.model: Any = model
        self.projections = projections
        self.shifts_labels = shifts_labels(model)
        self.num_samples = int(num_samples)
        self.seed = int(seed)
        self.combine = combine
        names = [projection.site.name for projection in projections]
        self.expansion = LateExpansion(model, layers_from(model, names), self.num_samples)
        self._noises = position_noises(self.seed, len(projections), self.num_samples)
        self._now = EnsemblePass()

    # ---- into the model ----

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """Repeat the inputs once per sample; see `Pass`.

        Raises:
            ValueError: an input that cannot be repeated, an empty or too long prompt, a cache from elsewhere, an
                output that has no mean, or other sites than when the ensemble began.
        """
        if self._now.num_rows is not None:
            self.stop()  # the pass before failed
        if not projections:
            return None, []  # without noise one sample is as good as many
        if projections != self.projections:
            raise ValueError("The adapter was changed within an ensemble: change it before the ensemble begins.")
        inputs = dict(kwargs)
        names = (*TEXT_INPUTS, getattr(self.model, "main_input_name", ""), *inputs)
        name = next((name for name in names if isinstance(inputs.get(name), torch.Tensor)), None)
        if name is None:
            raise ValueError(f"An ensemble repeats the rows of a tensor, and the inputs {list(inputs)} hold none.")
        main = inputs[name]
        self._now.num_rows = main.shape[0]
        check_prompt(main)
        self._check_inputs(inputs, main)
        self._now.labels = self._pop_labels(inputs)
        self._mark(inputs.get("past_key_values"))
        layout, positions = Layout(self.num_samples * main.shape[0]), None
        if name in TEXT_INPUTS:
            positions_BL = self._positions(inputs, main).cpu()
            self._check_positions(positions_BL, padded=inputs.get("attention_mask") is not None)
            positions = locate(positions_BL, main.device)
            kept = inputs.get("logits_to_keep")
            spares_padding = any(projection.site.spares_padding for projection in projections)
            layout = layout._replace(
                length=main.shape[1],
                mask=padding_mask(inputs, main.shape[1]) if spares_padding else None,
                num_kept=kept if isinstance(kept, int) else None,
            )
        draws = [
            PositionDraw(
                self.num_samples, noise, positions, layout, projection.known_dims, projection.site.spares_padding
            )
            for noise, projection in zip(self._noises, projections, strict=True)
        ]
        return ((), self.expansion.expand(inputs, main.shape[0])), draws

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
        """Combine the samples' logits, and compute the loss of the result; see `Pass`."""
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
        """End this thread's forward pass: no part of the model that is called by itself may draw from it."""
        self._now.num_rows = None
        self.expansion.stop()
        for projection in self.projections:
            projection.forget_draw()

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
                    f"{name} is not available inside model.ensemble(): each of the samples has its own. Use "
                    "model.sampling(seed)."
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
        self._check_sites_read_no_cache()
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

    def _check_sites_read_no_cache(self) -> None:
        names = [projection.site.name for projection in self.projections if projection.site.reads_cache]
        if names:
            raise ValueError(
                f"'{names[0]}' sees the cached tokens again at each step, and an ensemble's noise is for new ones: "
                "generate with use_cache=False, or choose other sites."
            )

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
            self._check_sites_read_no_cache()
        if config.cache_implementation not in _CACHES:
            raise ValueError(
                f"An ensemble supports the caches {_CACHES}, got cache_implementation={config.cache_implementation!r}."
            )


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, one of numpy's too; a truth value is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_prompt(prompt: torch.Tensor | None) -> None:
    """Refuse a prompt without tokens; where there is none at all, the model has one."""
    if prompt is not None and prompt.dim() > 1 and prompt.shape[1] == 0:
        raise ValueError(f"The prompt is empty, of shape {tuple(prompt.shape)}: give at least one token, such as bos.")


def predict(model: PeftModel, inputs: Mapping[str, Any], num_samples: int, seed: int = 0) -> Prediction:
    """Predict with k noisy samples, and say what they disagree on; no gradients.

    Args:
        model (`PeftModel`): with a DIP adapter, in eval mode.
        inputs (`Mapping`): model inputs; a `labels` entry is ignored.
        num_samples (`int`): k; 1 knows no disagreement.
        seed (`int`): which k networks: those of `model.ensemble(num_samples, seed=seed)`.

    Returns:
        `Prediction`: for a causal language model `log_probs` of shape `(B, L, V)`, and the others of shape `(B, L)`,
        in nats. Position t speaks of the token at t + 1.

    Raises:
        ValueError: the model has no DIP adapter, or as `model.ensemble` does.
    """
    if not hasattr(model, "ensemble_samples"):
        raise ValueError(f"predict needs a model with a DIP adapter, from get_dip_model, got {type(model).__name__}.")
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), model.ensemble_samples(num_samples, seed):
        logits_SBLV = model(**inputs).logits
    return predictive_entropies(torch.log_softmax(logits_SBLV.float(), dim=-1))
