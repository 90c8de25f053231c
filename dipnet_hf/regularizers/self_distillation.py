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

    Every batch runs twice, first with dropout and noise and then without, and of a supervised token's predictions

        loss = NLL_noisy + alpha * KL(stop_gradient(p_noisy) || p_clean),

    averaged over the tokens. Labels reach `p_clean` by way of `p_noisy` alone. The divergence's gradient is linear in
    the teacher's probabilities, so over the steps the mean of the draws is taught, without an ensemble in any step.

    Cost: 2 forward and backward passes per step; the activations and logits of both at once, and those of the second
    without gradient checkpointing, which networks leave off in eval mode. The divergence is taken in chunks, which
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
        self._model: Any = model

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        loss, noisy_NV = self.predict(batch)
        # Within `model.sampling(seed)` there is noise in eval mode too.
        without_noise = getattr(self._model, "deterministic", nullcontext)
        with in_eval_mode(self._model), without_noise():
            _, clean_NV = self.predict(batch)
        divergence = summed_divergence(_kl, noisy_NV.detach(), clean_NV)
        return loss + self.alpha * batch.weight(len(clean_NV)) * divergence


def _kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    """`KL(p || q)`, summed over the tokens."""
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)
