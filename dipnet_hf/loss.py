"""`dip_loss`: the objective, eqs. (2) to (4), of a model from `get_dip_model` in any training loop."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import extract_model_from_parallel

from .architecture import router_loss_weight, shifts_labels
from .batches import expand_batch
from .config import DipConfig
from .data_loss import data_terms
from .hidden_states import HiddenStateCapture
from .objective import Terms


class DipLoss(NamedTuple):
    """Scalar tensors, each already weighted. `loss` is the sum of the others, plus the load-balancing loss of a
    mixture of experts where the model returns one. It has all gradients; with a stability term `nll` and `stability`
    have none of their own.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    prior: torch.Tensor
    stability: torch.Tensor


class NoisyModel(Protocol):
    """What the objective asks of a `DipModel`."""

    model: Any
    active_dip_config: DipConfig
    hidden_state_capture: HiddenStateCapture

    def sampled_rows(self) -> AbstractContextManager[None]:
        """Context of a training pass on S equal copies of a batch's rows."""

    def prior_loss(self) -> torch.Tensor:
        """Eq. (3)."""


def unwrap(model: Any) -> NoisyModel:
    """The model from `get_dip_model` within a wrapper of DDP or `torch.compile`; it forwards what its tuner has."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def sampled_data_terms(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Terms, Any]:
    """Compute eqs. (2) and (4) on one batch, as the active adapter's config says, and the model's outputs.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped.
        batch (`dict`): model inputs with `labels`.

    Raises:
        ValueError: a row cannot be repeated, see `expand_batch`.
    """
    tuner = unwrap(model)
    config = tuner.active_dip_config
    inputs = expand_batch(batch, config.num_samples)
    with tuner.sampled_rows():
        return data_terms(
            model,
            inputs,
            shifts_labels(tuner.model),
            tuner.hidden_state_capture,
            config.num_samples,
            config.stability_loss_weight,
            config.stability_target,
        )


def dip_loss(
    model: torch.nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
) -> DipLoss:
    """Compute the objective of a model's active DIP adapter on one batch, in one forward of S times its rows.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped by DDP or `torch.compile`.
        batch (`dict`): model inputs with `labels` of shape `(B, L)`, -100 where unsupervised, or `(B,)` for classes.
        num_items_in_batch (`int` or scalar tensor, *optional*): supervised tokens in the whole optimizer step. Give it
            when accumulating gradients: the data and stability terms are divided by it, and the prior is weighted by
            this batch's share of it, so that the micro-batches add up to the one large batch.

    Returns:
        `DipLoss`: `(loss, nll, prior, stability)`, scalars. Differentiate once.

    Raises:
        ValueError: the batch has no `labels`.
    """
    if "labels" not in batch:
        raise ValueError(f"dip_loss needs `labels` in the batch, got {sorted(batch)}.")
    tuner = unwrap(model)
    terms, outputs = sampled_data_terms(model, batch)
    num_items = terms.num_tokens if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(num_items, device=terms.total.device).clamp(min=1)
    share = 1.0 if num_items_in_batch is None else terms.num_tokens / num_items
    prior = share * tuner.prior_loss()
    loss = terms.total / num_items + prior
    if getattr(outputs, "aux_loss", None) is not None:
        loss = loss + share * router_loss_weight(tuner.model) * outputs.aux_loss
    # Without a stability term the total is the NLL, with its gradients.
    nll = terms.nll if tuner.active_dip_config.stability_loss_weight else terms.total
    return DipLoss(loss, nll / num_items, prior, terms.stability / num_items)
