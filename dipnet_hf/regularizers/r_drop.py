"""R-Drop: two passes that differ by dropout or noise shall predict the same.

Shape legend: N supervised tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch

from .regularizer import Batch
from .two_passes import TwoPasses, summed_divergence


@dataclass
class RDrop(TwoPasses):
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
        ValueError: as `TwoPasses` does.
    """

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        (first, logits_NV), (second, others_NV) = self.predict(batch), self.predict(batch)
        divergence = symmetric_kl(logits_NV, others_NV)
        return (first + second) / 2 + self.alpha / 4 * batch.weight(len(logits_NV)) * divergence


def symmetric_kl(logits_NV: torch.Tensor, others_NV: torch.Tensor) -> torch.Tensor:
    """`KL(p || q) + KL(q || p)` of two predictions, summed over the tokens; a scalar, in at least float32."""
    return summed_divergence(_symmetric_kl, logits_NV, others_NV)


def _symmetric_kl(log_p_NV: torch.Tensor, log_q_NV: torch.Tensor) -> torch.Tensor:
    return ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum()
