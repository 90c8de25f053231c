"""What the methods share that compare a batch's predictions in two passes, which differ by dropout or noise.

Shape legend: N supervised tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..architecture import has_class_loss, network_of, shifts_labels
from ..batches import supervised, targets_of
from .layer_dropout import LayerDropout
from .regularizer import Batch, Regularizer, precise

_CHUNK_LOGITS = 2**24  # logits of one chunk: 64 MiB in float32


@dataclass
class TwoPasses(Regularizer):
    """A method that compares the predictions of two passes.

    Args:
        alpha (`float`): the weight of the divergence.
        layer_dropout (`float`): dropout at the input of every decoder layer in training, for networks without any.

    Raises:
        ValueError: a setting out of range; a network whose two passes would be equal; DIPNet with `num_samples` above
            1; or labels that are no classes.
    """

    alpha: float = 1.0
    layer_dropout: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha of {name} must be positive and finite, got {self.alpha!r}.")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(
                f"layer_dropout of {name} must be at least 0 and less than 1, got {self.layer_dropout!r}."
            )

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        name, dip = type(self).__name__, getattr(model, "active_dip_config", None)
        if dip is not None and dip.num_samples > 1:
            raise ValueError(
                f"{name} compares two passes, and DIPNet with num_samples={dip.num_samples} compares its samples by "
                f"itself: set num_samples=1, or stability_loss_weight in place of {name}."
            )
        if self.layer_dropout == 0 and not _is_random(model):
            raise ValueError(
                f"{name} compares two passes that differ by dropout or noise, and those of this model are equal: set "
                f"{name}'s layer_dropout, or lora_dropout of LoRA, or train with DIPNet."
            )
        self._network = network_of(model)
        self._dropout = LayerDropout(self.layer_dropout) if self.layer_dropout else None
        if self._dropout is not None:
            self._dropout.attach(model)

    def detach(self) -> None:
        """See `Regularizer`."""
        if self._dropout is not None:
            self._dropout.detach()

    def predict(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch once: its data loss, a scalar, and the logits at its supervised tokens, of shape `(N, V)`."""
        loss, outputs = batch.run(outputs=True)
        name, network = type(self).__name__, self._network
        if not hasattr(outputs, "logits"):
            raise ValueError(
                f"{name} compares predictions, and what computes the loss gives none: leave `forward` of "
                "`regularizer.backward` out, or use DipTrainer."
            )
        logits = outputs.logits
        if "labels" not in batch.inputs:
            raise ValueError(
                f"{name} compares predictions at labels, and the batch has none, only {sorted(batch.inputs)}: it "
                "works with trainers of one labelled text per row."
            )
        labels, shift = targets_of(batch.inputs, shifts_labels(network))
        if not has_class_loss(network, logits, labels):
            raise ValueError(
                f"{name} compares predictions of classes, and {type(network).__name__} is not known to have one "
                f"label for each vector of its logits, which have the shape {tuple(logits.shape)}."
            )
        return loss, supervised(logits, labels.to(logits.device), shift)[0]


def summed_divergence(
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], logits_NV: torch.Tensor, others_NV: torch.Tensor
) -> torch.Tensor:
    """Sum a divergence of two predictions over the tokens, in chunks that are computed again in the backward pass.

    Args:
        divergence (`Callable`): takes the log-probabilities of some tokens in two passes, in at least float32, and
            gives a scalar, their sum over these tokens.
        logits_NV, others_NV (`torch.Tensor` of shape `(N, V)`): the logits of the two passes.
    """

    def of_chunk(logits_NV: torch.Tensor, others_NV: torch.Tensor) -> torch.Tensor:
        return divergence(precise(logits_NV).log_softmax(-1), precise(others_NV).log_softmax(-1))

    num_tokens = max(1, _CHUNK_LOGITS // logits_NV.shape[-1])
    chunks = zip(logits_NV.split(num_tokens), others_NV.split(num_tokens), strict=True)
    return sum(
        (checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks),
        start=logits_NV.new_zeros((), dtype=precise(logits_NV[:0]).dtype),
    )


def _is_random(model: nn.Module) -> bool:
    """Whether a forward pass in training draws something: dropout of modules or of functions, noise, an adapter's."""
    adapters = getattr(model, "peft_config", {}).values()
    if any(_samples_weights(adapter) or _samples_weights(getattr(adapter, "weights", None)) for adapter in adapters):
        return True
    if any("dip_logvar" in name for name, _ in model.named_parameters()):
        return True
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        rates = (value for name, value in vars(module).items() if "drop" in name.lower())
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def _samples_weights(adapter: Any) -> bool:
    """Whether an adapter of PEFT draws its weights anew in every pass: PVeRA and MonteCLoRA."""
    return getattr(adapter, "peft_type", None) == "PVERA" or getattr(adapter, "monteclora_config", None) is not None
