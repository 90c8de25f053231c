"""The prior of MonteCLoRA's weights, which PEFT computes and no trainer adds."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import nn

from .regularizer import Batch, Regularizer


@dataclass
class MonteCLoRA(Regularizer):
    """The variational loss of MonteCLoRA, PEFT's Monte Carlo LoRA (`LoraConfig(monteclora_config=...)`).

    In training PEFT draws LoRA's A anew in every pass, around its mean, and gives the divergences of what it draws
    from, and the entropy, for the loss. Alone, the noise is trained on the data and shrinks. Here they are added:

        loss = NLL + mean over the layers of (kl_loss_weight * KL + entropy)

    The weights are those of `MontecloraConfig`. In evaluation A is its mean.

    Take `buffer_size=1`: by default PEFT keeps the draws of 150 passes, each of the size of `num_samples` times A.
    They are neither repeated by gradient checkpointing, whose gradients are wrong then, nor saved in a checkpoint.

    Cost: 1 pass, and what PEFT takes for the draws.

    Raises:
        ValueError: a model without LoRA that is drawn.
    """

    needs_lora: ClassVar[bool] = True

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self._samplers = [module for module in model.modules() if isinstance(module, MontecloraSampler)]
        if not self._samplers:
            raise ValueError(
                f"MonteCLoRA regularizes what LoRA draws, and this {type(model).__name__} draws none: set "
                "monteclora_config of LoRA, such as {num_samples: 8, buffer_size: 1}."
            )

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        data_loss = batch.loss()  # before the penalty, which is one of the variances of this pass
        penalties = [sum(sampler.get_variational_loss()) for sampler in self._samplers]
        return data_loss + batch.share * sum(penalties) / len(penalties)
