"""What methods that act on LoRA share: where its matrices are, and samples that differ in noise on its A.

Shape legend: S samples, R rank, I a layer's input.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from .samples import SampledRegularizer, network_of


class LoraSite(NamedTuple):
    """A linear layer with one LoRA adapter: it adds `scaling * B(A(x))`."""

    name: str  # of the layer in the network
    layer: Any
    adapter: str

    @property
    def a_RI(self) -> nn.Parameter:
        """A."""
        return self.layer.lora_A[self.adapter].weight

    @property
    def b_OR(self) -> nn.Parameter:
        """B."""
        return self.layer.lora_B[self.adapter].weight


def lora_sites(model: nn.Module, method: str) -> list[LoraSite]:
    """Find the active LoRA adapters of a network's linear layers, in the order of the modules.

    Raises:
        ValueError: there are none; or one is of another kind, in which other code than A's and B's forward runs.
    """
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            # A variant, and an expert's wrapper, may use A without calling it.
            is_plain = adapter not in layer.lora_variant and not isinstance(layer, ParamWrapper)
            if adapter in layer.lora_A and is_plain and isinstance(layer.lora_A[adapter], nn.Linear):
                found.append(LoraSite(name, layer, adapter))
            elif adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                kind = type(layer).__name__
                raise ValueError(
                    f"{method} takes plain LoRA of linear layers, and '{name}' has another kind, {kind}: leave "
                    "embeddings, convolutions, experts and variants such as DoRA out of the LoraConfig."
                )
    if not found:
        raise ValueError(
            f"{method} acts on the matrices of LoRA, and {type(model).__name__} has none: make it with "
            "peft.get_peft_model(model, LoraConfig(...)), or in the recipe set weights: {peft_type: LORA}."
        )
    return found


class LoraNoise(SampledRegularizer):
    """A method that draws the A of every layer from Gaussians around its learned entries."""

    needs_lora: ClassVar[bool] = True

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """See `Regularizer`."""
        self.sites: Sequence[LoraSite] = lora_sites(network_of(model), type(self).__name__)
        super().attach(model, optimizer)
        for number, site in enumerate(self.sites):
            hook = partial(self._add_noise, number)
            self._handles.append(site.layer.lora_A[site.adapter].register_forward_hook(hook))

    def std(self, number: int) -> torch.Tensor:
        """The standard deviations of a site's A, of shape `(R, I)` or `(R, 1)`."""
        raise NotImplementedError

    def training_noise(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """What is added to `A x` in training; None adds nothing."""
        return None

    def _add_noise(self, number: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        x = args[0]
        if (samples := self.samples) is None:
            noise = self.training_noise(number, x) if module.training else None
            return None if noise is None else output + noise.to(output.dtype)
        noise_SRI = samples.noise(number, tuple(self.sites[number].a_RI.shape), x.device) * self.std(number).float()
        tokens = samples.split(x).flatten(1, -2)
        return output + torch.bmm(tokens, noise_SRI.to(x.dtype).mT).view_as(output)
