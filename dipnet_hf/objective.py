"""The training objective, eqs. (2) to (4): pure tensor functions, and `dip_loss` for any training loop.

Shape legend: S samples, B batch, L sequence, V vocabulary, N supervised tokens. A batch of S samples is laid out
sample by sample: rows 0..B-1 are sample 0, rows B..2B-1 sample 1, and so on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel

from .chunked_loss import chunked_loss
from .shared_prompt import by_sample

IGNORE_INDEX = -100


class DipLoss(NamedTuple):
    """Scalar tensors, each already weighted. `loss` is the sum of the others, plus the load-balancing loss of a
    mixture of experts where the model returns one. It has all gradients; with a stability term `nll` and `stability`
    have none of their own.
    """

    loss: torch.Tensor
    nll: torch.Tensor
    prior: torch.Tensor
    stability: torch.Tensor


def kl_weights(prior_std: float, weight: float) -> tuple[float, float]:
    """Give the `(alpha, beta)` for which eq. (3) is `weight * KL(N(0, lambda) || N(0, prior_std^2))` up to a constant.

    `alpha = weight / (2 prior_std^2)` and `beta = weight / 2`; without data the variances settle at `prior_std^2`.

    Raises:
        ValueError: `prior_std` is not positive, or `weight` is negative.
    """
    if not prior_std > 0:
        raise ValueError(f"prior_std must be positive, got {prior_std}.")
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}.")
    return weight / (2 * prior_std**2), weight / 2


def prior_loss(logvars: Sequence[torch.Tensor], alpha: float, beta: float, reduction: str = "mean") -> torch.Tensor:
    """Eq. (3): `alpha * lambda - beta * ln(lambda)`, averaged or summed over all sites and channels.

    Args:
        logvars (`Sequence[torch.Tensor]`): `ln(lambda)`, one vector a site.
        reduction (`str`): `"mean"`, or `"sum"`, the paper's own.
    """
    logvar = torch.cat([logvar.to(logvars[0].device) for logvar in logvars])
    # A zero weight drops its term instead of multiplying it: at zero variance 0 * inf would be NaN.
    terms = torch.zeros_like(logvar)
    if alpha:
        terms = terms + alpha * logvar.exp()
    if beta:
        terms = terms - beta * logvar
    return terms.mean() if reduction == "mean" else terms.sum()


def expand_batch(batch: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Repeat every row of `batch` once a sample, sample by sample.

    Boundaries of sequences in one row, of packed and padding-free data, go on where the last sample ended.

    Args:
        batch (`dict`): model inputs with `labels`, whose first dimension is the batch.
        num_samples (`int`): S.
    """
    if num_samples == 1:
        return batch
    if "labels" not in batch:
        raise ValueError(
            f"num_samples={num_samples} repeats the rows of `labels`, and the batch has only {sorted(batch)}."
        )
    rows = batch["labels"].shape[0]
    expanded = {**batch, **_boundaries(batch)}
    for name, value in expanded.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            continue
        if name.startswith("cu_seq_lens"):
            starts, total = value[:-1], value[-1:]
            expanded[name] = torch.cat([starts + s * total for s in range(num_samples)] + [num_samples * total])
        elif value.shape[0] == rows:
            expanded[name] = value.repeat(num_samples, *[1] * (value.dim() - 1))
        else:
            raise ValueError(
                f"num_samples={num_samples} repeats the rows of a batch, and {name} of shape {tuple(value.shape)} "
                f"does not have one for each of the {rows} rows. Use num_samples=1."
            )
    return expanded


def _boundaries(batch: dict[str, Any]) -> dict[str, Any]:
    """The boundaries of sequences in one row that only positions tell: in several rows flash attention sees none."""
    positions = batch.get("position_ids")
    known = any(name.startswith("cu_seq_lens") for name in batch)
    if known or positions is None or positions.dim() != 2 or len(positions) > 1 or (positions == 0).sum() < 2:
        return {}
    starts = (positions[0] == 0).nonzero().flatten().to(torch.int32)
    boundaries = torch.cat([starts, starts.new_tensor([positions.shape[1]])])
    longest = int(boundaries.diff().max())
    return {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def supervised(outputs: torch.Tensor, labels: torch.Tensor, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the supervised positions: outputs of shape `(rows * N, ...)` and their targets of shape `(rows * N,)`.

    Args:
        outputs (`torch.Tensor`): logits or hidden states of shape `(rows, L, ...)`, or `(rows, V)` for classes.
        labels (`torch.Tensor`): of shape `(rows, L)` or `(rows,)`, -100 where unsupervised.
        shift (`bool`): the labels of position t are the targets of position t - 1.
    """
    if shift:
        outputs, labels = outputs[:, :-1], labels[:, 1:]
    mask = labels != IGNORE_INDEX
    return outputs[mask], labels[mask]


def stability_penalty(outputs_SN: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Eq. (4) before its weight: the unbiased variance over the S samples, summed over the supervised tokens.

    Unbiased for independent samples. Antithetic pairs are not: for an f that is linear in the noise the expectation is
    S / (S - 1) times the variance, and with one pair the even part of f is not seen. `antithetic=False` avoids both.

    Args:
        outputs_SN (`torch.Tensor` of shape `(S * N,)` or `(S * N, V)`): target log-probabilities or logits at the
            supervised tokens, sample by sample; the variance of logits is summed over V.
        num_samples (`int`): S, at least 2.
    """
    samples = outputs_SN.float().unflatten(0, (num_samples, -1))
    return (samples - samples.mean(0)).square().sum() / (num_samples - 1)


class DataTerms(NamedTuple):
    """Eqs. (2) and (4), the latter weighted, summed over `num_tokens` supervised tokens, and the model's outputs.

    `total` is the sum of the two and has the gradients; the two are detached. The outputs hold logits of no
    token where the terms did without them.
    """

    total: torch.Tensor
    nll: torch.Tensor
    stability: torch.Tensor
    num_tokens: int
    outputs: Any


def data_terms(model: torch.nn.Module, batch: dict[str, Any], num_samples: int | None = None) -> DataTerms:
    """Compute the data and the stability term in one forward pass, from whole logits only where there is no other way.

    Args:
        model (`torch.nn.Module`): from `get_dip_model`, also wrapped.
        batch (`dict`): model inputs with `labels`.
        num_samples (`int`, *optional*): S of eq. (2) alone; by default what the active adapter's config says of both.

    Raises:
        ValueError: a row cannot be repeated, see `expand_batch`, or its prompt not shared, see `shared_prompt`.
    """
    tuner = extract_model_from_parallel(model, keep_torch_compile=False)
    config, shift = tuner.active_dip_config, tuner.shifts_labels
    samples, weight, target = config.num_samples, config.stability_loss_weight, config.stability_target
    if num_samples is not None:
        samples, weight = num_samples, 0.0
    sample_BW = None
    if config.shared_prompt_noise and num_samples is None:
        inputs, sample_BW = tuner.share_prompts(batch, samples)
    else:
        inputs = expand_batch(batch, samples)
    labels = inputs["labels"]
    if shift:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if inputs.get("position_ids") is not None:
            inputs["use_cache"] = False  # with a cache transformers does not look for several sequences in a row
    taken = None
    num_copies = samples if sample_BW is None else 1  # of the rows
    with tuner.sampled_rows(num_copies, config.antithetic):
        if shift:
            with tuner.hidden_states_taken(labels.shape) as head_inputs:
                outputs = model(**inputs)
                taken = head_inputs.pop()
        else:
            outputs = model(**inputs)

    def select(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if sample_BW is None:
            return supervised(outputs, labels.to(outputs.device), shift)
        return by_sample(outputs, labels.to(outputs.device), sample_BW.to(outputs.device), samples)

    if taken is not None:
        hidden_RLD, head = taken
        hidden_RD, targets = select(hidden_RLD)
        total, nll, stability = chunked_loss(hidden_RD, targets, head, samples, weight, target)
        # The logits of no token tie the loss to the outputs, from whose gradient DDP starts with a static graph.
        total = total + outputs.logits.sum().to(total)
        return DataTerms(total, nll, stability, targets.numel() // samples, outputs)
    logits, targets = select(outputs.logits)
    log_probs = -F.cross_entropy(logits.float(), targets, reduction="none")
    nll = -log_probs.sum() / samples
    stability = nll.new_zeros(())
    if weight:
        stability = weight * stability_penalty(log_probs if target == "log_prob" else logits, samples)
    return DataTerms(nll + stability, nll.detach(), stability.detach(), targets.numel() // samples, outputs)


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
    tuner = extract_model_from_parallel(model, keep_torch_compile=False)
    terms = data_terms(model, batch)
    num_items = terms.num_tokens if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(num_items, device=terms.total.device).clamp(min=1)
    share = 1.0 if num_items_in_batch is None else terms.num_tokens / num_items
    prior = share * tuner.prior_loss()
    loss = terms.total / num_items + prior
    if getattr(terms.outputs, "aux_loss", None) is not None:
        loss = loss + share * tuner.config.router_aux_loss_coef * terms.outputs.aux_loss
    nll = terms.nll if tuner.active_dip_config.stability_loss_weight else terms.total
    return DipLoss(loss, nll / num_items, prior, terms.stability / num_items)
