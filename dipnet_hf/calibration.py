"""Measuring the scale of relative noise: the RMS of every site's input on a few batches."""

from collections.abc import Iterable

import torch
from accelerate.utils import send_to_device
from torch import nn

from .projection import DipProjection, NoiseSwitch


def measure_rms(
    model: nn.Module, projections: list[DipProjection], switch: NoiseSwitch, batches: Iterable
) -> torch.Tensor:
    """Measure the RMS of every site's input, dropout off, padding left out, over the batches of all processes.

    Args:
        model (`nn.Module`): the base model; its modules keep their modes.
        projections (`list[DipProjection]`): the sites.
        switch (`NoiseSwitch`): of these sites.
        batches (`Iterable`): model inputs, mappings (a `labels` entry is ignored) or single tensors.

    Returns:
        `torch.Tensor` of shape `(sites,)`, float64.

    Raises:
        ValueError: there is no batch, or a site's RMS is zero or not finite.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for projection in projections:
        projection.pop_measured()  # what a calibration that failed has left
    switch.measuring = True
    try:
        with torch.no_grad():
            for batch in batches:
                batch = send_to_device(batch, device)
                if isinstance(batch, torch.Tensor):
                    model(batch)
                else:
                    model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        switch.measuring = False
        for module, training in modes:
            module.training = training

    measured = torch.stack([projection.pop_measured() for projection in projections])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        measured = measured.to(device)
        torch.distributed.all_reduce(measured)
    rms = (measured[:, 0] / measured[:, 1]).sqrt().cpu()
    for projection, value in zip(projections, rms, strict=True):
        if not torch.isfinite(value) or value == 0:
            raise ValueError(
                f"Calibration measured an RMS of {float(value)} at site '{projection.site.name}'. Give at least "
                "one batch, check it for NaN and infinity, and check the model's output on it."
            )
    return rms
