"""Samples that differ in noise on LoRA's A.

Shape legend: S samples, R rank, I a layer's input.
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ..architecture import network_of
from ..sampled_rows import SampledRows
from .lora import LoraSite, lora_sites
from .samples import Combine, SampledRegularizer


class LoraNoise(SampledRegularizer):
    """A method that draws the A of every layer from Gaussians around its learned entries."""

    needs_lora: ClassVar[bool] = True

    def install(self, model: nn.Module) -> None:
        """See `Regularizer`."""
        self.sites: Sequence[LoraSite] = lora_sites(network_of(model), type(self).__name__)
        super().install(model)
        for number, site in enumerate(self.sites):
            hook = partial(self._add_noise, number)
            self._handles.append(site.layer.lora_A[site.adapter].register_forward_hook(hook))

    def make_samples(self, num_samples: int, seed: int, combine: Combine) -> SampledRows:
        """See `Answering`; an adapter that does not run by itself would have no noise."""
        for name, layer, adapter in self.sites:
            if layer.merged or adapter not in layer.active_adapters:
                state = "merged" if layer.merged else "not active"
                raise ValueError(
                    f"The adapter '{adapter}' of '{name}' is {state}, so its samples cannot be drawn: call "
                    "unmerge_adapter() or set_adapter(name)."
                )
        return super().make_samples(num_samples, seed, combine)

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
