"""Normality normalization: what LayerNorm and RMSNorm give out is made more Gaussian, and gets noise in training.

Shape legend: x is any tensor with the D features of a sample along its last dimension.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..architecture import hidden_size
from .regularizer import Regularizer

_GATE = "normality_gate"  # what the parameter is called in a norm


@dataclass
class NormalityNormalization(Regularizer):
    """Normality normalization (Eftekhari and Papyan 2025, arXiv 2505.00685), in its form for LayerNorm, and RMSNorm.

    Between a norm and its affine part every sample (a token) gets a Yeo-Johnson transform `psi` of its own, whose
    parameter is one Newton step on the likelihood of its D features being normal, see `newton_step`:

        y = weight * (psi(x; lambda) + noise_std * s * z) + bias,   z ~ N(0, I),   s = mean |psi - mean psi|

    The noise is added in training alone; its size `s`, one per token, is a constant to the gradient. The transform
    stays at inference. Here `lambda` is `1 + gate * (newton_step - 1)`: with a gate of 1 that is the paper's layer.

    A norm is a module whose class is called `...LayerNorm` or `...RMSNorm`, with a weight for each channel between the
    layers. Those of single attention heads are left alone.

    Cost: 1 pass. Each norm runs twice, and computes its transform again in the backward pass; two more tensors of the
    norm's output stay, one in float32.

    Args:
        noise_std (`float`): xi of the paper, whose code has 1 for LayerNorm, in networks that are trained with it from
            the start; a pretrained one does not survive that.
        start_at_identity (`bool`): the gate is one learned number per norm, first 0: a pretrained network begins as
            it was. False is the paper's layer, with a gate of 1, which changes a pretrained network at once.

    Raises:
        ValueError: a setting out of range, or a model without such norms.
    """

    changes_network: ClassVar[bool] = True

    noise_std: float = 0.1
    start_at_identity: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.noise_std < math.inf:
            raise ValueError(
                f"noise_std of NormalityNormalization must be finite and at least 0, got {self.noise_std!r}."
            )

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        norms = _find_norms(model)
        if not norms:
            raise ValueError(
                f"NormalityNormalization changes LayerNorms and RMSNorms with a weight of the hidden size, and "
                f"{type(model).__name__} has none: give it a transformer."
            )
        self._norms = norms
        self._hooks = []
        for norm in norms.values():
            neutral = _neutral(norm)
            if self.start_at_identity:
                gate = nn.Parameter(torch.zeros((), device=norm.weight.device))
                norm.register_parameter(_GATE, gate)
            transform = _Transform(neutral, self.noise_std)
            self._hooks.append(norm.register_forward_hook(transform, with_kwargs=True))

    def detach(self) -> None:
        """See `Regularizer`."""
        for hook in self._hooks:
            hook.remove()
        for norm in self._norms.values():
            if self.start_at_identity:
                delattr(norm, _GATE)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The gates by the names of their norms."""
        return {name: getattr(norm, _GATE) for name, norm in self._norms.items() if self.start_at_identity}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """See `Regularizer`."""
        with torch.no_grad():
            for name, gate in self.state_dict().items():
                gate.copy_(state[name])


class _Neutral(NamedTuple):
    """A norm without its affine part, and what its weight lacks to be the factor: 1 where it multiplies by 1 + w."""

    norm: Any
    offset: float


@dataclass
class _Transform:
    """The forward hook of one norm. It adds what changes to the norm's own output, which so stays as it is to the bit
    where nothing does.
    """

    neutral: _Neutral
    noise_std: float

    def __call__(self, norm: Any, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        normalized = self.neutral.norm.to(output.device)(*args, **kwargs).to(dtype)
        gate = getattr(norm, _GATE, None)
        noise_std = self.noise_std if norm.training else 0.0
        change = checkpoint(_change, normalized, gate, noise_std, use_reentrant=False)
        factor = norm.weight.to(dtype) + self.neutral.offset
        return (output.to(dtype) + factor * change).to(output.dtype)


def _change(x: torch.Tensor, gate: torch.Tensor | None, noise_std: float) -> torch.Tensor:
    """What the transform and the noise add to x."""
    step = newton_step(x) - 1
    change = yeo_johnson_change(x, 1 + (step if gate is None else gate * step))
    if not noise_std:
        return change
    transformed = (x + change).detach()
    size = (transformed - transformed.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
    return change + noise_std * size * torch.randn_like(x)


def yeo_johnson_change(x: torch.Tensor, lmbda: torch.Tensor) -> torch.Tensor:
    """`psi(x; lambda) - x` of the Yeo-Johnson power transform, exactly 0 where lambda is 1.

    `psi` is `((1 + x)^lambda - 1) / lambda` for positive x. Negative ones are mirrored, with `2 - lambda`.
    """
    sign, log = x.sign(), x.abs().log1p()
    power = 1 + sign * (lmbda - 1)
    # The series keeps the gradient right where 0 / 0 is near.
    near_zero = power.abs() < 1e-3
    safe = power.where(~near_zero, 1.0)
    series = log * (1 + power * log / 2 * (1 + power * log / 3))
    transformed = torch.where(near_zero, series, (safe * log).expm1() / safe)
    return sign * (transformed - log.expm1())  # not |x|, from which it differs by rounding


def newton_step(x: torch.Tensor) -> torch.Tensor:
    """One Newton step from 1 towards the lambda that makes the features most likely to be normal, of shape (..., 1).

    With `l = sign(x) log(1 + |x|)` the negative log-likelihood of a sample is, per feature and up to a constant,
    `L(lambda) = log(var(psi)) / 2 - (lambda - 1) mean(l)`, and at lambda = 1, where `psi = x`,

        L' = cov(x, psi') / v - mean(l),   L'' = (var(psi') + cov(x, psi'')) / v - 2 (cov(x, psi') / v)^2

    with `v = var(x)`, `psi' = (1 + |x|) |l| - |x|`, `psi'' = sign(x) ((1 + |x|) l^2 - 2 psi')`. The paper's formulas
    are these for the mean of 0 and the variance of 1 that LayerNorm gives. L is convex: L'' is positive but for
    rounding.
    """
    sign, size = x.sign(), x.abs()
    log = size.log1p()
    first = (1 + size) * log - size
    second = sign * ((1 + size) * log.square() - 2 * first)
    centered, first_centered = (a - a.mean(-1, keepdim=True) for a in (x, first))
    variance = centered.square().mean(-1, keepdim=True)
    is_constant = variance < 1e-6  # such features have no best lambda
    variance = variance.where(~is_constant, 1.0)
    covariance = (centered * first).mean(-1, keepdim=True) / variance
    slope = (covariance - (sign * log).mean(-1, keepdim=True)).where(~is_constant, 0.0)
    curvature = (first_centered.square() + centered * second).mean(-1, keepdim=True) / variance - 2 * covariance**2
    return 1 - slope / curvature.clamp(min=1e-3)


def _find_norms(model: nn.Module) -> dict[str, Any]:
    size = hidden_size(model)
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        and getattr(module, "weight", None) is not None
        and module.weight.shape == (size,)
    }


@torch.no_grad()
def _neutral(norm: Any) -> _Neutral:
    neutral = copy.deepcopy(norm).requires_grad_(False)
    neutral._forward_hooks.clear()
    neutral._forward_pre_hooks.clear()
    for parameter in neutral.parameters():
        parameter.zero_()
    sample = torch.linspace(-1, 1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    offset = float(neutral(sample[None]).any())  # Gemma's norms give something with a weight of zero
    neutral.weight.fill_(1 - offset)
    return _Neutral(neutral, offset)
