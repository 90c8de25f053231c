"""Self-distillation of noise: the network without noise learns the noisy one's mean prediction as training goes.

Shape legend: N supervised tokens, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..modes import in_eval_mode
from .regularizer import Batch
from .two_passes import TwoPasses, summed_divergence


@dataclass
class SelfDistillation(TwoPasses):
    """Training with noise, and teaching its prediction to the network that answers in one pass without noise.

    Every batch runs twice, without and with dropout and noise, and of a supervised token's predictions

        loss = (NLL_noisy + NLL_clean) / 2 + alpha * KL(stop_gradient(p_noisy) || p_clean),

    averaged over the tokens. The divergence's gradient is linear in the teacher's probabilities, so over the steps the
    mean of the draws is taught, without an ensemble in any step. Let through to the teacher, it would make the noise
    harmless instead, as R-Drop does.

    Cost: 2 forward and backward passes per step; the activations and logits of both at once, and those of the clean
    one without gradient checkpointing, which networks leave off in eval mode. The divergence is taken in chunks, which
    are computed again in the backward pass.

    Args:
        alpha (`float`): the weight of the divergence.
        layer_dropout (`float`): dropout at the input of every decoder layer in training, for networks without any.

    Raises:
        ValueError: as `TwoPasses` does.
    """

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        super().install(model)
        # Within `model.sampling(seed)` there is noise in eval mode too.
        self._without_noise: Any = getattr(model, "deterministic", nullcontext)

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        # Not the model around the network, so that a trainer adds to both losses what it adds in training.
        with in_eval_mode(self._network), self._without_noise():
            clean_loss, clean_NV = self.predict(batch)
        # Last, as DistributedDataParallel looks there for the parameters in use, and the noise has some of its own.
        noisy_loss, noisy_NV = self.predict(batch)
        divergence = kl(noisy_NV.detach(), clean_NV)
        return (noisy_loss + clean_loss) / 2 + self.alpha * batch.weight(len(clean_NV)) * divergence


def kl(logits_NV: torch.Tensor, others_NV: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)` of two predictions, summed over the tokens; a scalar, in at least float32."""
    return summed_divergence(_kl, logits_NV, others_NV)


def _kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
