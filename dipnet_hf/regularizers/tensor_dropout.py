"""Dropout of the rank-one components that LoRA's change of a weight is made of."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from .lora import adapters_of, lora_layers
from .regularizer import Regularizer


@dataclass
class TensorDropout(Regularizer):
    """Tensor dropout (Kolbeinsson et al. 2019, arXiv 1902.10758) of the factorised weight `B A` of LoRA.

    In training a layer adds `s B diag(m) A`, `m = z / (1 - p)`, `z` Bernoulli of `1 - p`, one for each of the `r`
    components: the Bernoulli sketch of a CP decomposition, whose components here are the columns of `B` and rows of
    `A`. There is one draw for the whole batch at each layer, as it is the weight that is sketched; its mean is the
    plain weight, which is what evaluation uses. Draws come from torch's generator, as those of `nn.Dropout` do.

    Cost: no pass; `r` numbers per layer.

    Args:
        p (`float`): the probability that a component is left out.

    Raises:
        ValueError: a setting out of range, or a model without plain LoRA.
    """

    needs_lora: ClassVar[bool] = True

    p: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p of TensorDropout must be between 0 and 1, got {self.p!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        layers = lora_layers(model, "TensorDropout")
        if not layers:
            raise ValueError(
                f"TensorDropout drops components of LoRA's matrices, and {type(model).__name__} has none that learn: "
                "wrap it with get_peft_model and a LoraConfig."
            )
        self._hooks = [
            layer.lora_A[adapter].register_forward_hook(self._drop)
            for layer in layers.values()
            for adapter in adapters_of(layer)
        ]

    def _drop(self, module: nn.Module, args: Any, output_R: torch.Tensor) -> torch.Tensor | None:
        """Leave components of the output of A out; its last dimension is the rank."""
        if not module.training:
            return None
        keep_R = torch.full(output_R.shape[-1:], 1 - self.p, device=output_R.device).bernoulli() / (1 - self.p)
        return output_R * keep_R.to(output_R.dtype)

    def detach(self) -> None:
        """See `Regularizer`."""
        for hook in self._hooks:
            hook.remove()
