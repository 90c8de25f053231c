"""Decay towards the weights that training started with, instead of towards zero."""

from dataclasses import dataclass

import torch
from torch import nn

from .lora import factors, lora_layers
from .regularizer import Batch, Regularizer, precise, weights


@dataclass
class L2SP(Regularizer):
    """L2-SP (Li, Grandvalet and Davoine 2018, arXiv 1802.01483): train on `loss + weight / 2 * |w - w0|^2`.

    `w0` are the weights when the method is attached. For LoRA, `w` is the weight of the layer, which has moved by
    `s B A - s B0 A0`; its norm follows from matrices of the size of the rank. With `decoupled` there is no term in the
    loss; before every step of the optimizer `w` becomes `w - lr * weight * (w - w0)`, `lr` being that of its parameter
    group, as AdamW does it with `w0 = 0`. That is not defined for A and B, of which no one has a start of its own.

    Cost: no pass; a copy of the weights that learn, also in checkpoints.

    Args:
        weight (`float`): alpha of the paper.
        decoupled (`bool`): move the weights, not the loss.

    Raises:
        ValueError: a setting out of range, `decoupled` with LoRA, or a kind of LoRA that is not the product of two
            matrices.
    """

    weight: float = 0.01
    decoupled: bool = False

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"weight of L2SP must be positive, got {self.weight!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self._layers = lora_layers(model, "L2SP")
        if self._layers and self.decoupled:
            raise ValueError(
                "decoupled of L2SP moves each weight towards its own start, and the matrices of LoRA have none: only "
                "their product has. Use decoupled=False, which penalizes the product."
            )
        in_layers = {parameter for layer in self._layers.values() for parameter in layer.parameters()}
        self._weights = {name: weight for name, weight in weights(model).items() if weight not in in_layers}
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}
        for name, layer in self._layers.items():
            self._start[f"{name}.A"], self._start[f"{name}.B"] = (factor.detach().clone() for factor in factors(layer))

    def loss(self, batch: Batch) -> torch.Tensor:
        """See `Regularizer`."""
        loss = batch.loss()
        if self.decoupled:
            self.check_watching()
            return loss
        return loss + batch.share * self.weight / 2 * self.squared_distance().to(loss.device)

    def squared_distance(self) -> torch.Tensor:
        """The squared norm of how far the weights have moved, a scalar."""
        device = next(iter(self._start.values())).device
        with torch.autocast(device.type, enabled=False):
            plain = [precise(weight - self._start[name]).square().sum() for name, weight in self._weights.items()]
            products = [self._of_product(name) for name in self._layers]
            return torch.stack([term.to(device) for term in plain + products]).sum()

    def _of_product(self, name: str) -> torch.Tensor:
        """`|B A - B0 A0|^2`, as the trace of products of matrices of twice the rank."""
        A_RI, B_OR = factors(self._layers[name])
        A_RI = torch.cat([A_RI, self._start[f"{name}.A"]])
        B_OR = torch.cat([B_OR, -self._start[f"{name}.B"]], dim=1)
        return ((A_RI @ A_RI.T) * (B_OR.T @ B_OR)).sum()

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """See `Regularizer`."""
        if not self.decoupled:
            return
        start = {self._weights[name]: start for name, start in self._start.items()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in start and parameter.grad is not None:
                    # In this order it is AdamW's own arithmetic.
                    parameter.mul_(1 - group["lr"] * self.weight)
                    parameter.add_(start[parameter] * (group["lr"] * self.weight))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """See `Regularizer`."""
        return self._start

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        for name, start in self._start.items():
            start.copy_(state[name])
