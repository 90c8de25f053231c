"""R-Drop: two passes that differ by dropout or noise shall predict the same.

Shape legend: N supervised tokens, V vocabulary.
"""

import math
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
class RDrop(Regularizer):
    """R-Drop (Wu et al. 2021, arXiv 2106.14448, eqs. 1 to 3).

    Every batch runs twice, with other dropout and noise, and of the predictions `p` and `q` of a supervised token

        loss = (NLL_p + NLL_q) / 2 + alpha / 4 * (KL(p || q) + KL(q || p)),

    averaged over the tokens: half of the paper's loss, whose data term is the sum of both passes, so that `alpha` is
    the paper's and the loss is of the size of the plain one.

    Cost: 2 forward and backward passes per step; the activations and logits of both at once. The divergence is taken
    in chunks, which are computed again in the backward pass.

    With DIPNet of one sample its noise makes the difference, too. Of more samples eq. (4) compares the predictions.

    Args:
        alpha (`float`): the paper uses 1 to 5 for texts, 0.6 for images.
        layer_dropout (`float`): dropout at the input of every decoder layer in training, for networks without any.

    Raises:
        ValueError: a setting out of range; a network whose two passes would be equal; DIPNet with `num_samples` above
            1; or labels that are no classes.
    """

    alpha: float = 1.0
    layer_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha of RDrop must be positive and finite, got {self.alpha!r}.")
        if not 0 <= self.layer_dropout < 1:
            raise ValueError(f"layer_dropout of RDrop must be at least 0 and less than 1, got {self.layer_dropout!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        dip: Any = getattr(model, "active_dip_config", None)
        if dip is not None and dip.num_samples > 1:
            raise ValueError(
                f"RDrop compares two passes, and DIPNet with num_samples={dip.num_samples} compares its samples by "
                "itself: set num_samples=1, or stability_loss_weight in place of RDrop."
            )
        if self.layer_dropout == 0 and not _is_random(model):
            raise ValueError(
                "RDrop compares two passes that differ by dropout or noise, and those of this model are equal: set "
                "RDrop's layer_dropout, or lora_dropout of LoRA, or train with DIPNet."
            )
        self._network = network_of(model)
        self._dropout = LayerDropout(self.layer_dropout) if self.layer_dropout else None
        if self._dropout is not None:
            self._dropout.attach(model)

    def detach(self) -> None:
        """See `Regularizer`."""
        if self._dropout is not None:
            self._dropout.detach()

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        (first, outputs), (second, other_outputs) = batch.run(outputs=True), batch.run(outputs=True)
        logits_NV, others_NV = (self._supervised(batch, passed.logits) for passed in (outputs, other_outputs))
        divergence = symmetric_kl(logits_NV, others_NV)
        return (first + second) / 2 + self.alpha / 4 * batch.weight(len(logits_NV)) * divergence

    def _supervised(self, batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if "labels" not in batch.inputs:
            raise ValueError(
                f"RDrop compares predictions at labels, and the batch has none, only {sorted(batch.inputs)}: it works "
                "with trainers of one labelled text per row."
            )
        labels, shift = targets_of(batch.inputs, shifts_labels(self._network))
        if not has_class_loss(self._network, logits, labels):
            raise ValueError(
                f"RDrop compares predictions of classes, and {type(self._network).__name__} is not known to have one "
                f"label for each vector of its logits, which have the shape {tuple(logits.shape)}."
            )
        return supervised(logits, labels.to(logits.device), shift)[0]


def symmetric_kl(logits_NV: torch.Tensor, others_NV: torch.Tensor) -> torch.Tensor:
    """`KL(p || q) + KL(q || p)` of two predictions, summed over the tokens; a scalar, in at least float32."""
    num_tokens = max(1, _CHUNK_LOGITS // logits_NV.shape[-1])
    chunks = zip(logits_NV.split(num_tokens), others_NV.split(num_tokens), strict=True)
    return sum(
        (checkpoint(_symmetric_kl, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks),
        start=logits_NV.new_zeros((), dtype=precise(logits_NV[:0]).dtype),
    )


def _symmetric_kl(logits_NV: torch.Tensor, others_NV: torch.Tensor) -> torch.Tensor:
    log_p_NV, log_q_NV = (precise(x).log_softmax(-1) for x in (logits_NV, others_NV))
    return ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum()


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
