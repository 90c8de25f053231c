"""Dropout and Gaussian dropout at every decoder layer's input, and the mean of k such networks: MC dropout."""

import math
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..architecture import decoder_layers, network_of
from .samples import SampledRegularizer

_KINDS = ("bernoulli", "gaussian")


@dataclass
class LayerDropout(SampledRegularizer):
    """Dropout (Srivastava et al. 2014, JMLR 15) at the input of every decoder layer, in models without any too.

    The layer gets `x * m` for its input `x`, with `m` of mean 1 for each channel: `m = z / (1 - p)`,
    `z ~ Bernoulli(1 - p)`; or Gaussian, of the same variance, `m ~ N(1, p / (1 - p))` (section 10 there). In
    training each token has an `m` of its own, from PyTorch's global generators. `ensemble` is MC dropout (Gal and
    Ghahramani 2016, arXiv 1506.02142), with one `m` per sample and layer for all tokens: what variational dropout for
    sequences draws (arXiv 1512.05287), but it does so in training too.

    The input of a layer is the whole residual stream. In pretrained language models it holds massive activations and
    outlier channels, which multiplicative noise hits in proportion: the usual `p = 0.1` leaves little of such a
    network. Hence the small default; `layers_to_transform` may leave out layers.

    Cost: 1 pass; one mask per layer is kept for the backward pass. An ensemble: k rows for one.

    Args:
        p (`float`): the probability of zero, or what gives Gaussian noise the variance `p / (1 - p)`.
        kind (`str`): `"bernoulli"` or `"gaussian"`.
        layers_to_transform (`list[int]`, *optional*): the numbers of the layers; all of them if not given.

    Raises:
        ValueError: a setting out of range, a layer that is not there, or no decoder layers are found.
    """

    p: float = 0.01
    kind: str = "bernoulli"
    layers_to_transform: list[int] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p of LayerDropout must be between 0 and 1, got {self.p!r}.")
        if self.kind not in _KINDS:
            raise ValueError(f"kind of LayerDropout must be one of {', '.join(_KINDS)}, got {self.kind!r}.")

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        layers = [layer for _, layer in decoder_layers(network_of(model))]
        chosen = range(len(layers)) if self.layers_to_transform is None else self.layers_to_transform
        if wrong := [number for number in chosen if number not in range(len(layers))]:
            raise ValueError(
                f"layers_to_transform of LayerDropout names layer {wrong[0]}, and the model has layers 0 to "
                f"{len(layers) - 1}."
            )
        super().install(model)
        for number in chosen:
            hook = partial(self._drop_input, number)
            self._handles.append(layers[number].register_forward_pre_hook(hook, with_kwargs=True))

    def _drop_input(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.samples is None and not layer.training:
            return None
        if args:
            return (self._drop(number, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._drop(number, kwargs["hidden_states"])}

    def _drop(self, number: int, x: torch.Tensor) -> torch.Tensor:
        std = math.sqrt(self.p / (1 - self.p))
        if (samples := self.samples) is None:
            if self.kind == "bernoulli":
                return F.dropout(x, self.p)
            return torch.addcmul(x, x, torch.randn_like(x), value=std)
        noise_SD = samples.noise(number, (x.shape[-1],), x.device)
        if self.kind == "bernoulli":
            factor_SD = (noise_SD > NormalDist().inv_cdf(self.p)) / (1 - self.p)
        else:
            factor_SD = 1 + std * noise_SD
        factor = factor_SD.to(x.dtype).view(len(factor_SD), *[1] * (x.dim() - 1), -1)
        return (samples.split(x) * factor).flatten(0, 1)
