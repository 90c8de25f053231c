"""Calibration: the scale of the noise is measured, and the level at which all variances start is found by the loss."""

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .calibration_loss import CalibrationLoss
from .config import DipConfig
from .modes import in_eval_mode
from .projection import DipProjection
from .scale import ScaleMeter
from .sharding import whole

_logger = logging.getLogger(__name__)

_FIRST_STD = 0.05
_MAX_TRIALS = 4  # of two passes each
_CLOSE, _CLOSE_ENOUGH = 0.1, 0.9  # how far from the wanted increase the search ends, and may end at worst
_HIGH_INCREASE = 1.0  # nats per supervised token, from which a given level is warned of


def find_std(loss_at: Callable[[float], float], loss: float, increase: float) -> tuple[float, float]:
    """Find the noise std at which the loss has risen by `increase`, within a tenth of it if four trials allow that.

    As the loss rises about with the variance, the next variance is where a straight line between the trials below and
    above reaches `increase` (regula falsi with the Illinois rule).

    Args:
        loss_at (`Callable`): std to loss, the same draws every time; it is called at most four times.
        loss (`float`): without noise.
        increase (`float`): positive.

    Returns:
        `tuple[float, float]`: the std, and the loss at it.

    Raises:
        ValueError: no std that was tried raises the loss by between a tenth of that and nearly twice as much.
    """
    std, trials = _FIRST_STD, []
    low, high = (0.0, -increase), (math.inf, math.nan)  # variance, and what the loss has risen too much
    was_low = None
    for _ in range(_MAX_TRIALS):
        trials.append((std, loss_at(std)))
        excess = trials[-1][1] - loss - increase
        if abs(excess) <= _CLOSE * increase:
            return trials[-1]
        is_low = excess < 0  # NaN and infinity are not: noise that a dtype cannot hold is too much
        if is_low:
            low, high = (std**2, excess), (high[0], high[1] / 2 if was_low else high[1])
        else:
            low, high = (low[0], low[1] / 2 if was_low is False else low[1]), (std**2, excess)
        std, was_low = math.sqrt(_next_variance(low, high, increase)), is_low
    closest = min(trials, key=lambda trial: abs(trial[1] - loss - increase) if math.isfinite(trial[1]) else math.inf)
    if abs(closest[1] - loss - increase) <= _CLOSE_ENOUGH * increase:
        return closest
    tried = ", ".join(f"{noisy_loss:.4g} at {std:.3g}" for std, noisy_loss in sorted(trials))
    raise ValueError(
        f"No noise was found that raises the loss of the calibration batches, {loss:.4g}, by "
        f"init_loss_increase={increase:.4g}; tried {tried}. A model that predicts nothing yet does not feel noise, "
        "nor does one whose sites lead nowhere, and float16 may not hold it. Give a number, such as "
        "init_noise_std=0.1."
    )


def _next_variance(low: tuple[float, float], high: tuple[float, float], increase: float) -> float:
    if math.isinf(high[0]):  # nothing was too much yet
        risen = low[1] + increase
        return low[0] * (min(increase / risen, 256) if risen > 0 else 16)
    if not math.isfinite(high[1]):
        return math.sqrt(max(low[0], high[0] / 4096) * high[0])
    if low[0] == 0.0:  # everything was: faster than a straight line from zero, as the loss rises ever faster
        return high[0] * (increase / (high[1] + increase)) ** 0.75
    return low[0] + (high[0] - low[0]) * low[1] / (low[1] - high[1])


def calibrate(
    model: nn.Module,
    config: DipConfig,
    projections: list[DipProjection],
    batches: list,
    batch_loss: CalibrationLoss,
) -> None:
    """Set the scale of the sites and, where it is to be found, the std at which their variances begin.

    See `DipModel.calibrate`. A level that was given as a number is tried, and warned of if it costs more than a nat.

    Args:
        model (`nn.Module`): the network.
        config (`DipConfig`): of the adapter.
        projections (`list[DipProjection]`): its sites.
        batches (`list`): model inputs.
        batch_loss (`CalibrationLoss`): of the network and these batches.
    """
    if config.noise_scale == "absolute" and config.init_noise_std != "auto":
        raise ValueError(
            'noise_scale="absolute" has nothing to calibrate: its scale is 1, and init_noise_std was given.'
        )
    finds_level = any(not projection.level_is_known for projection in projections)
    before = [projection.noise_state() for projection in projections]
    try:
        with in_eval_mode(model), torch.no_grad():
            meter = ScaleMeter(model, projections)
            with meter.attached():
                loss = batch_loss.mean(meter.watch(batches), noise=False)
            scales = meter.scales() if config.noise_scale == "relative" else [torch.ones(())] * len(projections)
            for projection, scale in zip(projections, scales, strict=True):
                projection.set_noise(scale=scale)
            if loss is not None and not math.isfinite(loss):
                raise ValueError(
                    f"The loss of the calibration batches is {loss} without any noise. Check the batches, and the "
                    "model's output on them, for NaN and infinity."
                )
            if finds_level:
                _check_labels(loss)
                batches = [batch_loss.draw_labels(batch, seed) for seed, batch in enumerate(batches)]
                _find_level(projections, batches, batch_loss, config.init_loss_increase)
            elif loss is not None and config.init_noise_std:
                _warn_of_high_level(loss, _noisy_loss(projections, batches, batch_loss))
    except BaseException:
        for projection, state in zip(projections, before, strict=True):
            projection.restore_noise(state)
        raise


def _check_labels(loss: float | None) -> None:
    if loss is None:
        raise ValueError(
            'init_noise_std="auto" finds the level of the noise by the loss of the calibration batches, and they hold '
            "no supervised token. Give batches with labels, or a number, such as init_noise_std=0.1."
        )


def _find_level(projections: list[DipProjection], batches: list, batch_loss: CalibrationLoss, increase: float) -> None:
    def loss_at(std: float) -> float:
        for projection in projections:
            projection.set_noise(std=std)
        return _noisy_loss(projections, batches, batch_loss)

    loss = _known(batch_loss.mean(batches, noise=False))
    std, noisy_loss = find_std(loss_at, loss, increase)
    for projection in projections:
        projection.set_noise(std=std)
    _logger.info("Noise level %.3g found: loss of the model's own answers %.4g -> %.4g", std, loss, noisy_loss)


def _noisy_loss(projections: list[DipProjection], batches: list, batch_loss: CalibrationLoss) -> float:
    """The loss with noise, the mean of two passes of opposite noise.

    What is linear in the noise cancels. It is the largest part by far, and says nothing of what noise costs.
    """
    losses = []
    for _ in range(2):
        losses.append(batch_loss.mean(batches, noise=True))
        for projection in projections:
            projection.set_noise(scale=-whole(projection.scale))
    return sum(map(_known, losses)) / 2


def _warn_of_high_level(loss: float, noisy_loss: float) -> None:
    if not noisy_loss - loss <= _HIGH_INCREASE:
        warnings.warn(
            f"The noise raises the loss of the calibration batches from {loss:.4g} to {noisy_loss:.4g}, by more than "
            f"{_HIGH_INCREASE:g} nat per token, and training will have to repair that first. "
            'init_noise_std="auto" finds a level that the model survives.',
            stacklevel=4,
        )


def noise_sweep(
    model: nn.Module,
    projections: list[DipProjection],
    batches: list,
    stds: Sequence[float],
    per_site: bool,
    batch_loss: CalibrationLoss,
) -> list[dict[str, Any]]:
    """Measure the loss at each of `stds`, with noise at all sites and at each alone; see `DipModel.noise_sweep`."""
    if not all(math.isfinite(std) and std > 0 for std in stds):
        raise ValueError(f"The stds of a sweep must be positive and finite, got {list(stds)}.")
    before = [projection.noise_state() for projection in projections]
    try:
        with in_eval_mode(model), torch.no_grad():
            loss = batch_loss.mean(batches, noise=False)
            if loss is None:
                raise ValueError("noise_sweep measures the loss of the batches, and they hold no supervised token.")
            rows: list[dict[str, Any]] = [{"site": "all", "std": 0.0, "loss": loss}]
            for noisy in [projections, *([projection] for projection in projections if per_site)]:
                site = "all" if noisy is projections else noisy[0].site.name
                for projection, state in zip(projections, before, strict=True):
                    projection.restore_noise(state)
                    if projection not in noisy:
                        projection.set_noise(scale=torch.zeros(()))
                for std in stds:
                    for projection in noisy:
                        projection.set_noise(std=std)
                    rows.append({"site": site, "std": std, "loss": _noisy_loss(projections, batches, batch_loss)})
    finally:
        for projection, state in zip(projections, before, strict=True):
            projection.restore_noise(state)
    return rows


def _known(loss: float | None) -> float:
    assert loss is not None  # batches that had a loss without noise have one with it
    return loss
