"""What every instrument asks of a model: to stand still, and its predictions of the supervised tokens.

Shape legend: B batch, L sequence, V vocabulary, N supervised tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..architecture import is_encoder_decoder, network_of, setting, shifts_labels
from ..batches import num_supervised, supervised
from ..modes import in_eval_mode
from ..uncertainty import expected_calibration_error

Batch = Mapping[str, Any]
_ATTENTION_WITH_SECOND_DERIVATIVES = (None, "eager", "sdpa")


@contextmanager
def standing_still(model: nn.Module, learning: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Context in which a model is in eval mode, only `learning` wants gradients, and all derivatives exist.

    Raises:
        ValueError: the model is an encoder-decoder, or its attention has no second derivatives.
    """
    network = network_of(model)
    if is_encoder_decoder(network):
        raise ValueError(f"{type(network).__name__} is an encoder-decoder, which the diagnostics do not support.")
    attention = setting(network, "_attn_implementation")
    if attention not in _ATTENTION_WITH_SECOND_DERIVATIVES:
        raise ValueError(
            f"The attention {attention!r} has no second derivatives: load the model with "
            'attn_implementation="sdpa" or "eager".'
        )
    wants = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = set(learning)
    try:
        for parameter in wants:
            parameter.requires_grad_(parameter in chosen)
        # PyTorch's fused kernels can be differentiated once only.
        with in_eval_mode(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter, wanted in wants.items():
            parameter.requires_grad_(wanted)


def num_targets(model: nn.Module, batch: Batch) -> int:
    """Count the supervised tokens of a batch.

    Raises:
        ValueError: there are none.
    """
    labels = batch.get("labels")
    count = 0 if labels is None else num_supervised(labels, shifts_labels(network_of(model)))
    if not count:
        raise ValueError(f"A batch needs labels that are not all -100, got the entries {sorted(batch)}.")
    return count


def predict_targets(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a batch: the logits `(N, V)` at the supervised tokens, in float32 or more, and the targets `(N,)`."""
    num_targets(model, batch)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    logits_NV, targets_N = supervised(logits, batch["labels"], shifts_labels(network_of(model)))
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), targets_N


def losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The NLL of every supervised token of a batch, in nats, of shape `(N,)`."""
    return F.cross_entropy(*predict_targets(model, batch), reduction="none")


class TokenFigures(NamedTuple):
    """What a model says of N supervised tokens, on the CPU in float64, each of shape `(N,)`."""

    nll: torch.Tensor  # nats
    confidence: torch.Tensor  # the largest probability
    correct: torch.Tensor  # 1 where the target has it, else 0


class Scores(NamedTuple):
    """Means over supervised tokens."""

    nll: float  # nats
    accuracy: float  # of the likeliest token
    ece: float  # expected calibration error of the likeliest token


@torch.no_grad()
def token_figures(model: nn.Module, batch: Batch) -> TokenFigures:
    """Measure a model at every supervised token of a batch."""
    logits_NV, targets_N = predict_targets(model, batch)
    log_probs_NV = logits_NV.double().log_softmax(-1)
    confidence, predicted = log_probs_NV.max(-1)
    nll = -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
    return TokenFigures(nll.cpu(), confidence.exp().cpu(), (predicted == targets_N).double().cpu())


def summarize(figures: Iterable[TokenFigures]) -> Scores:
    """Average over the tokens of all batches."""
    nll, confidence, correct = map(torch.cat, zip(*figures, strict=True))
    return Scores(nll.mean().item(), correct.mean().item(), expected_calibration_error(confidence, correct))


def scores(model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """Measure a model's NLL, accuracy and calibration on batches with `labels`, as it stands and in eval mode."""
    with standing_still(model):
        return summarize([token_figures(model, batch) for batch in batches])
