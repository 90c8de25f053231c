"""The local Lipschitz constant of a model's predictions: the largest singular value of a Jacobian.

Shape legend: R rows of a pass, one supervised token each, L sequence, D hidden size, V vocabulary, N tokens.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..architecture import network_of, shifts_labels
from ..batches import IGNORE_INDEX
from .perturbation import EMBEDDINGS, Displacement, changed_at, typical_rms
from .predictions import Batch, num_targets, predict_targets, standing_still


class LipschitzConstants(NamedTuple):
    """Local Lipschitz constants of N tokens' predictions, per unit of the Euclidean norm of what is changed."""

    logits: torch.Tensor  # (N,), of the token's V logits
    loss: torch.Tensor  # (N,), of its NLL in nats: the norm of a gradient
    last_change: torch.Tensor  # (N,), of `logits` by the last iteration, relative: how far it has converged
    token_norm: float  # the norm of a typical token at the place, see `typical_rms`: makes constants relative


def lipschitz_constants(
    model: nn.Module,
    batch: Batch,
    place: str = EMBEDDINGS,
    num_tokens: int = 16,
    num_iterations: int = 10,
    rows_per_pass: int = 4,
    seed: int = 0,
) -> LipschitzConstants:
    """Measure how far a token's prediction can move when what passes a place moves a little, in the worst direction.

    For a supervised token, `J = d logits / d x`, x being its sequence's whole `(L, D)` at the place. The largest
    singular value of J is found by power iteration on `J^T J`, from below, with products of J and `J^T` alone: J v is
    the derivative of `J^T u` by u. A token costs as much as `4 + 2 * num_iterations` forward passes of its sequence,
    and the memory is that of `rows_per_pass` sequences.

    Args:
        model (`nn.Module`): a causal language model or classifier, plain or with an adapter. As it answers where this
            is called: inside `model.ensemble(k)` it is the mean's constant.
        batch (`Mapping`): model inputs with `labels`.
        place (`str`): `"embeddings"` or `"layer n"`, that layer's input.
        num_tokens (`int`): how many of the supervised tokens, drawn by the seed; all if there are fewer.
        num_iterations (`int`): at least 2.
        rows_per_pass (`int`): sequences at a time.
        seed (`int`): of the tokens and of where the iteration starts.

    Raises:
        ValueError: a number is too small, no such place, no labels, or a constant is not finite.
    """
    for name, value, least in (
        ("num_tokens", num_tokens, 1),
        ("num_iterations", num_iterations, 2),
        ("rows_per_pass", rows_per_pass, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with standing_still(model):
        for rows in _single_token_rows(model, batch, num_tokens, rows_per_pass, generator):
            displacement = Displacement(len(rows["labels"]))
            with changed_at(model, {place: displacement}):
                logits_RV, targets_R = predict_targets(model, rows)
            assert displacement.value is not None  # the place was passed
            parts.append(_constants(logits_RV, targets_R, displacement.value, num_iterations, generator))
            width = displacement.value.shape[-1]
        parts_of_batch = (
            {name: value[start : start + rows_per_pass] for name, value in batch.items()}
            for start in range(0, len(batch["labels"]), rows_per_pass)
        )
        rms = typical_rms(model, parts_of_batch, [place])[place]
    logits_N, loss_N, change_N = map(torch.cat, zip(*parts, strict=True))
    if not (logits_N.isfinite().all() and loss_N.isfinite().all()):
        raise ValueError(f"The Lipschitz constant at {place} is not finite: does the model overflow? Use float32.")
    return LipschitzConstants(logits_N.cpu(), loss_N.cpu(), change_N.cpu(), rms * math.sqrt(width))


def _single_token_rows(
    model: nn.Module, batch: Batch, num_tokens: int, rows_per_pass: int, generator: torch.Generator
) -> Iterator[dict]:
    """Batches in which every row has one supervised token, of tokens drawn from the batch."""
    num_targets(model, batch)
    labels = batch["labels"]
    wanted = labels != IGNORE_INDEX
    if shifts_labels(network_of(model)):
        wanted = wanted.clone()
        wanted[:, 0] = False  # nothing predicts the first
    tokens = wanted.nonzero()
    order = torch.randperm(len(tokens), generator=generator)[:num_tokens].to(tokens.device)
    for chosen in tokens[order].split(rows_per_pass):
        rows = {name: value[chosen[:, 0]] for name, value in batch.items()}
        if labels.dim() == 2:
            only = torch.full_like(rows["labels"], IGNORE_INDEX)
            number = torch.arange(len(chosen), device=labels.device)
            only[number, chosen[:, 1]] = rows["labels"][number, chosen[:, 1]]
            rows["labels"] = only
        yield rows


def _constants(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    x_RLD: torch.Tensor,
    num_iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    loss = F.cross_entropy(logits_RV, targets_R, reduction="sum")  # a row's gradient is that of its own loss
    (loss_gradient,) = torch.autograd.grad(loss, x_RLD, retain_graph=True)
    sigma, change = _largest_singular_values(logits_RV, x_RLD, num_iterations, generator)
    return sigma, _norms(loss_gradient), change


def _largest_singular_values(
    outputs: torch.Tensor, x: torch.Tensor, num_iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of each row's Jacobian `d outputs[r] / d x[r]`, and their relative change by the last iteration."""
    u = torch.zeros_like(outputs, requires_grad=True)
    (pulled,) = torch.autograd.grad(outputs, x, u, create_graph=True)  # J^T u, linear in u
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    sigma = previous = x.new_zeros(len(x))
    for _ in range(num_iterations):
        (pushed,) = torch.autograd.grad(pulled, u, _normalized(v), retain_graph=True)  # J v
        previous, sigma = sigma, _norms(pushed)
        (v,) = torch.autograd.grad(outputs, x, _normalized(pushed), retain_graph=True)
    return sigma, (sigma - previous).abs() / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)


def _norms(x: torch.Tensor) -> torch.Tensor:
    return x.detach().flatten(1).norm(dim=1)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    norms = _norms(x).clamp(min=torch.finfo(x.dtype).tiny)  # a Jacobian of zero stays zero
    return x.detach() / norms.view(-1, *[1] * (x.dim() - 1))
