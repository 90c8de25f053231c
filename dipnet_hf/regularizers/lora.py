"""What methods ask of LoRA: its layers, and the two small matrices of which a layer's change of weight is the product.

Shape legend: I inputs, O outputs, R rank.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import nn

from .regularizer import precise


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


def lora_layers(model: nn.Module, method: str) -> dict[str, Any]:
    """The layers whose LoRA learns, by name.

    Args:
        model (`nn.Module`): any network.
        method (`str`): who asks, for the errors.

    Raises:
        ValueError: one of them adds something other than the product of two matrices to the weight of a linear layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and any(parameter.requires_grad for parameter in _matrices(module))
    }
    check_plain(layers, method)
    return layers


def check_plain(layers: dict[str, Any], method: str) -> None:
    """Refuse layers that add something other than the product of two matrices to the weight of a linear layer."""
    for name, layer in layers.items():
        if not all(_is_plain(layer, adapter) for adapter in adapters_of(layer)):
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(
                f"{method} knows plain LoRA of linear layers, and that of {name} ({kind}) is of another kind: leave "
                "the layer out of target_modules, and switch variants such as use_dora off."
            )


def lora_sites(model: nn.Module, method: str) -> list[LoraSite]:
    """The active adapters of linear layers, whether they learn or not, in the order of the modules.

    Raises:
        ValueError: there are none; or one is of another kind, in which other code than A's and B's forward runs.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    check_plain(layers, method)
    sites = [LoraSite(name, layer, adapter) for name, layer in layers.items() for adapter in adapters_of(layer)]
    if not sites:
        raise ValueError(
            f"{method} acts on the matrices of LoRA, and {type(model).__name__} has none: make it with "
            "peft.get_peft_model(model, LoraConfig(...)), or in the recipe set weights: {peft_type: LORA}."
        )
    return sites


def _matrices(layer: LoraLayer) -> list[nn.Parameter]:
    modules = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [parameter for module in modules for parameter in module.parameters()]


def _is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether A and B are linear layers that run one after the other."""
    if isinstance(layer, (ParamWrapper, MultiheadAttention)) or layer.lora_variant.get(adapter):
        return False
    return adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)


def adapters_of(layer: LoraLayer) -> list[str]:
    """The names of the active adapters that the layer has."""
    return [
        adapter for adapter in layer.active_adapters if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    ]


def factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of all active adapters, so that `B @ A` is what they add to the weight, in float32 or higher.

    Returns:
        `torch.Tensor` of shape `(R, I)` and `torch.Tensor` of shape `(O, R)`: the latter with LoRA's factor.
    """
    A_RI = torch.cat([precise(layer.lora_A[adapter].weight) for adapter in adapters_of(layer)])
    scaled = [layer.scaling[adapter] * precise(layer.lora_B[adapter].weight) for adapter in adapters_of(layer)]
    return A_RI, torch.cat(scaled, dim=1)
