"""`dip_loss`: the objective, eqs. (2) to (4), of a model from `get_dip_model` in any training loop."""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.fsdp import FullyShardedDataParallel

from .architecture import has_class_loss, own_loss, router_loss_weight, shifts_labels
from .batches import expand_batch, num_supervised, supervised, targets_of
from .config import DipConfig
from .data_loss import data_terms
from .hidden_states import HiddenStateCapture
from .objective import Terms, data_terms_of_logits, stability_outputs, stability_penalty


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
    """The model from `get_dip_model` in a wrapper of DDP, DeepSpeed or `torch.compile`; it forwards all its tuner has.

    Raises:
        ValueError: FSDP1 has wrapped it.
    """
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) is not supported: it flattens the log-variances into pieces, of which "
            "the prior cannot be computed. Use FSDP2, torch.distributed.fsdp.fully_shard."
        )
    return extract_model_from_parallel(model, keep_torch_compile=False)


def sampled_data_terms(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[Terms, Any]:
    """Compute eqs. (2) and (4) on one batch, as the active adapter's config says, and the model's outputs.

    Eq. (2) is the model's own loss, taken as a mean over its supervised labels. Where that is known to be the cross
    entropy of the next tokens, it is computed without whole logits.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped.
        batch (`dict`): model inputs with `labels`.

    Raises:
        ValueError: a row cannot be repeated, see `expand_batch`; or what is needed of classes is asked of a model
            that predicts none, see `class_outputs`.
    """
    tuner = unwrap(model)
    config = tuner.active_dip_config
    inputs = expand_batch(batch, config.num_samples)
    num_samples, weight, target = config.num_samples, config.stability_loss_weight, config.stability_target
    shift = shifts_labels(tuner.model)
    plain = shift and "shift_labels" not in batch and tuner.hidden_state_capture.probe(model).loss_is_plain
    with tuner.sampled_rows():
        if plain:
            return data_terms(model, inputs, shift, tuner.hidden_state_capture, num_samples, weight, target)
        outputs = model(**inputs)
    loss = own_loss(tuner.model, outputs)
    if loss is None:
        logits_RV, targets_R = class_outputs(model, outputs, inputs)
        return data_terms_of_logits(logits_RV, targets_R, num_samples, weight, target), outputs
    num_tokens = num_supervised(*targets_of(batch, shift))
    nll = loss * num_tokens if num_tokens else 0.0 * outputs.logits.sum()  # the mean over nothing is NaN
    stability = nll.new_zeros(())
    if weight:
        values = stability_outputs(*class_outputs(model, outputs, inputs), target)
        stability = weight * stability_penalty(values, num_samples)
    return Terms(nll + stability, nll.detach(), stability.detach(), num_tokens), outputs


def class_outputs(model: torch.nn.Module, outputs: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits at the supervised labels, of shape `(N, V)`, and these labels, which are classes, of shape `(N,)`.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped.
        outputs (`Any`): the model's.
        batch (`dict`): its inputs, with `labels`.

    Raises:
        ValueError: the labels are not known to be classes, one for each vector of the logits.
    """
    tuner = unwrap(model)
    network = tuner.model
    logits: Any = getattr(outputs, "logits", None)
    model_shifts = shifts_labels(network)
    labels: Any = None
    if "labels" in batch:
        labels, shift = targets_of(batch, model_shifts)
    probe = tuner.hidden_state_capture.probe(model) if model_shifts else None
    is_other_loss = probe is not None and probe.has_run and not probe.loss_is_plain
    if is_other_loss or not has_class_loss(network, logits, labels):
        raise ValueError(
            f"{type(network).__name__} is not known to predict classes: its logits have the shape "
            f"{_shape(logits)} and its labels {_shape(labels)}"
            + (", and its own loss is not the cross entropy of the next tokens. " if is_other_loss else ". ")
            + "A stability term, and the loss of a model that returns none, need one class per vector of logits: set "
            "stability_loss_weight=0, or let the model return its loss."
        )
    return supervised(logits, labels.to(logits.device), shift)


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} ({value.dtype})" if isinstance(value, torch.Tensor) else type(value).__name__


def dip_loss(
    model: torch.nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
) -> DipLoss:
    """Compute the objective of a model's active DIP adapter on one batch, in one forward of S times its rows.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped by DDP, `torch.compile` or DeepSpeed's engine, or
            sharded by FSDP2.
        batch (`dict`): model inputs with `labels` as the model takes them: of shape `(B, L)`, -100 where unsupervised,
            `(B,)` for classes, or others of the model's own loss.
        num_items_in_batch (`int` or scalar tensor, *optional*): supervised labels in the whole optimizer step. Give it
            when accumulating gradients: the data and stability terms are divided by it, and the prior is weighted by
            this batch's share of it, so that the micro-batches add up to the one large batch.

    Returns:
        `DipLoss`: `(loss, nll, prior, stability)`, scalars. Differentiate once.

    Raises:
        ValueError: the batch has no `labels`; its rows cannot be repeated; or a stability term was asked of a model
            whose labels are no classes.
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
