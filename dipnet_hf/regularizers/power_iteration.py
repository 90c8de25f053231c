"""The largest singular values of the weight matrices that learn, by power iteration that goes on from step to step.

Shape legend: N matrices in one parameter, I inputs, O outputs.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .lora import factors, lora_layers
from .regularizer import precise, weights

_NUM_STEPS_AT_START = 20


class SpectralNorms:
    """The largest singular value of every weight matrix of a model that learns, with a gradient.

    A linear layer with LoRA has the matrix `W + s B A`, which is not built. A kernel of a convolution is the matrix of
    its output channels by all else (Yoshida and Miyato 2017, arXiv 1705.10941); a parameter of other
    shape with more than two dimensions holds a matrix in its last two for each index before, as those of experts do.

    Args:
        model (`nn.Module`): any network, with or without LoRA.
        method (`str`): who asks, for the errors.

    Raises:
        ValueError: no matrix learns; or a layer has another kind of adapter, or LoRA on a quantized weight.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        layers = lora_layers(model, method)
        _check_adapters(model, layers, method)
        in_layers = {parameter for layer in layers.values() for parameter in layer.parameters()}
        matrices: dict[str, _Plain | _WithLora] = {
            name: _Plain(parameter, model.get_submodule(name.rpartition(".")[0]))
            for name, parameter in weights(model).items()
            if parameter.dim() > 1 and parameter not in in_layers
        }
        self._matrices = matrices | {name: _WithLora(layer) for name, layer in layers.items()}
        if not self._matrices:
            raise ValueError(f"{method} has nothing to act on: no weight matrix of {type(model).__name__} learns.")
        generator = torch.Generator().manual_seed(0)
        self._vectors_NI = {
            name: precise(torch.randn(matrix.num_matrices, matrix.num_inputs, generator=generator).to(matrix.weight))
            for name, matrix in self._matrices.items()
        }
        self.iterate(_NUM_STEPS_AT_START)

    @torch.no_grad()
    def iterate(self, num_steps: int) -> None:
        """Take steps of the power iteration."""
        for name, matrix in self._matrices.items():
            for _ in range(num_steps):
                with torch.autocast(matrix.weight.device.type, enabled=False):
                    u_NO = nn.functional.normalize(matrix.times(self._vectors_NI[name]))
                    v_NI = matrix.transposed_times(u_NO)
                # A matrix of zeros tells no direction, and may have one later.
                known_N1 = v_NI.any(-1, keepdim=True)
                self._vectors_NI[name] = torch.where(known_N1, nn.functional.normalize(v_NI), self._vectors_NI[name])

    def values(self) -> torch.Tensor:
        """The singular values of all matrices, one vector: `u W v`, whose gradient is `u v^T`."""
        values = []
        for name, matrix in self._matrices.items():
            with torch.autocast(matrix.weight.device.type, enabled=False):
                product_NO = matrix.times(self._vectors_NI[name])
            u_NO = nn.functional.normalize(product_NO.detach())
            values.append((u_NO * product_NO).sum(-1))
        return torch.cat([value.to(values[0].device) for value in values])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The right singular vectors by the names of the matrices."""
        return dict(self._vectors_NI)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on with the vectors that `state_dict` gave."""
        self._vectors_NI = {name: state[name].to(vectors) for name, vectors in self._vectors_NI.items()}


class _Plain:
    """A parameter as N matrices."""

    def __init__(self, parameter: nn.Parameter, module: nn.Module) -> None:
        self.weight = parameter
        is_kernel = isinstance(module, nn.modules.conv._ConvNd)
        self._shape = (1, len(parameter), -1) if is_kernel else (-1, *parameter.shape[-2:])
        self.num_matrices, _, self.num_inputs = self._matrices().shape

    def _matrices(self) -> torch.Tensor:
        return precise(self.weight).reshape(self._shape)

    def times(self, v_NI: torch.Tensor) -> torch.Tensor:
        return torch.einsum("noi,ni->no", self._matrices(), v_NI)

    def transposed_times(self, u_NO: torch.Tensor) -> torch.Tensor:
        return torch.einsum("noi,no->ni", self._matrices(), u_NO)


class _WithLora:
    """The one matrix of a linear layer and its LoRA."""

    num_matrices = 1

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.weight = layer.get_base_layer().weight
        self.num_inputs = layer.in_features

    def _base(self) -> torch.Tensor:
        weight_OI = self.weight.T if self._layer.fan_in_fan_out else self.weight
        return precise(weight_OI)

    def times(self, v_NI: torch.Tensor) -> torch.Tensor:
        A_RI, B_OR = factors(self._layer)
        return v_NI @ self._base().T + v_NI @ A_RI.T @ B_OR.T

    def transposed_times(self, u_NO: torch.Tensor) -> torch.Tensor:
        A_RI, B_OR = factors(self._layer)
        return u_NO @ self._base() + u_NO @ B_OR @ A_RI


def _check_adapters(model: nn.Module, layers: dict[str, Any], method: str) -> None:
    learning = weights(model)
    for name, module in model.named_modules():
        if name in layers:
            weight = module.get_base_layer().weight
            if not weight.is_floating_point() or weight.dim() != 2:
                raise ValueError(
                    f"{method} multiplies with the weights under LoRA, and that of {name} is quantized "
                    f"({type(weight).__name__}): load the model in 16 or 32 bits."
                )
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, LoraLayer):
            adapter = [key for key in learning if key.startswith(f"{name}.") and ".base_layer." not in key]
            if adapter:
                raise ValueError(
                    f"{method} knows full weights and LoRA, and {name} has an adapter of another kind "
                    f"({type(module).__module__.split('.')[-2]}): use one of the two."
                )
