"""Inference with the mean of k noisy samples, Algorithm 2: one forward pass of k times the rows, averaged.

`sampled_rows.py` repeats the rows. Where only the upper layers are projected, they are repeated there: what lies below
runs once.

A token's noise is a pure function of (seed, site, sample, position), the same for all rows of a batch. So a cached
step, a pass over the whole sequence, another batch and another padding see the same k networks.

Shape legend: S samples, B batch, L sequence, V vocabulary. Row s * B + b is sample s of row b.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from .architecture import layers_from
from .draws import PositionDraw, SiteDraw
from .late_expansion import Inputs
from .layout import Layout, padding_mask
from .noise import locate, position_noises
from .projection import DipProjection
from .sampled_rows import SampledRows, check_samples
from .uncertainty import Prediction, predictive_entropies


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


def average_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The way to average of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in AVERAGES:
        raise ValueError(f"average must be one of {list(AVERAGES)}, got {name!r}.")
    return AVERAGES[name]


class Ensemble(SampledRows):
    """The `Pass` of `num_samples` samples per row, whose mean the model returns.

    Args:
        model (`nn.Module`): the network itself.
        projections (`list[DipProjection]`): the sites, in the order of the modules.
        num_samples, combine, seed: see `SampledRows`.
    """

    def __init__(
        self,
        model: nn.Module,
        projections: list[DipProjection],
        num_samples: int,
        combine: Callable[[torch.Tensor], torch.Tensor],
        seed: int,
    ) -> None:
        check_samples(num_samples, seed)
        if not projections:
            raise ValueError(
                "An ensemble needs the noise of a DIP adapter, and none is active: call set_adapter(name). "
                "A model that was merged or unloaded has none."
            )
        self.projections = projections
        names = [projection.site.name for projection in projections]
        super().__init__(model, num_samples, combine, seed, layers_from(model, names))
        self._noises = position_noises(self.seed, len(projections), self.num_samples)

    def begin(
        self, args: tuple, kwargs: dict[str, Any], projections: list[DipProjection]
    ) -> tuple[Inputs | None, Sequence[SiteDraw]]:
        """Repeat the inputs once per sample; see `Pass`.

        Raises:
            ValueError: as `SampledRows.repeat` does, or other sites than when the ensemble began.
        """
        if not projections:
            self.stop()  # the pass before may have failed
            return None, []  # without noise one sample is as good as many
        if projections != self.projections:
            raise ValueError("The adapter was changed within an ensemble: change it before the ensemble begins.")
        repeated = self.repeat(kwargs)
        layout, positions = Layout(self.num_samples * repeated.num_rows), None
        if repeated.tokens is not None and repeated.positions_BL is not None:
            length, kept = repeated.tokens.shape[1], kwargs.get("logits_to_keep")
            positions = locate(repeated.positions_BL.cpu(), repeated.tokens.device)
            spares_padding = any(projection.site.spares_padding for projection in projections)
            layout = layout._replace(
                length=length,
                mask=padding_mask(kwargs, length) if spares_padding else None,
                num_kept=kept if isinstance(kept, int) else None,
            )
        draws = [
            PositionDraw(
                self.num_samples, noise, positions, layout, projection.known_dims, projection.site.spares_padding
            )
            for noise, projection in zip(self._noises, projections, strict=True)
        ]
        return ((), repeated.inputs), draws

    def stop(self) -> None:
        """End this thread's forward pass: no part of the model that is called by itself may draw from it."""
        super().stop()
        for projection in self.projections:
            projection.forget_draw()

    def check_cache_is_usable(self) -> None:
        """See `SampledRows`: noise is a function of new tokens' positions."""
        names = [projection.site.name for projection in self.projections if projection.site.reads_cache]
        if names:
            raise ValueError(
                f"'{names[0]}' sees the cached tokens again at each step, and an ensemble's noise is for new ones: "
                "generate with use_cache=False, or choose other sites."
            )


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
    return predict_in(model.ensemble_samples(num_samples, seed), model, inputs)


def predict_in(samples: AbstractContextManager[None], model: nn.Module, inputs: Mapping[str, Any]) -> Prediction:
    """As `predict`, within a context in which a model's logits are those of its samples, of shape `(k, B, ...)`."""
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), samples:
        logits_SBLV = model(**inputs).logits
    return predictive_entropies(torch.log_softmax(logits_SBLV.float(), dim=-1))
