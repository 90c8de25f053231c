"""The noise that fits a model: the scale of every channel of every site, and the level at which all of them start.

Pretrained language models have a token with massive activations and channels far larger than the others, both of which
an RMS is made of. So a channel's scale is a median: that of its tokens' distance from their median.

Shape legend: N tokens, D channels of a site.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import DipConfig
from .projection import DipProjection, Site

MeanLoss = Callable[..., float | None]  # of `(batches, noise)`
DrawLabels = Callable[[Any, int], Any]  # of `(batch, seed)`

IGNORE_INDEX = -100

_logger = logging.getLogger(__name__)

# Tokens kept per site, over all processes, as far as all sites together stay within `_MAX_VALUES`; never fewer than
# `_MIN_TOKENS`. 32 sites of 4,096 channels keep 512 tokens: 134 MB in bfloat16, 268 MB in float32.
# A channel's scale from 512 tokens is within 5% (one standard error) of that of all tokens.
_MAX_TOKENS, _MIN_TOKENS, _MAX_VALUES = 512, 128, 2**26
_FEW_TOKENS = 64  # a scale from so few is off by 15%
# Standard deviations within which 50% and 90% of a normal distribution lie.
_WIDTH_OF_50, _WIDTH_OF_90 = 0.67449, 1.64485
_FLOOR = 0.01  # of the site's typical scale; the smallest in SmolLM2-135M is 0.36 of it, in Gemma 3 270M 0.034

_FIRST_STD = 0.05
_MAX_TRIALS = 4  # of two passes each
_CLOSE, _CLOSE_ENOUGH = 0.1, 0.9  # how far from the wanted increase the search ends, and may end at worst
_HIGH_INCREASE = 1.0  # nats per supervised token, from which a given level is warned of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class ScaleMeter:
    """Measures the scale of every channel of every site, from a random sample of the tokens that the sites see.

    Args:
        model (`nn.Module`): the network, whose config tells which mask is that of the sites' tokens.
        projections (`list[DipProjection]`): the sites.
    """

    def __init__(self, model: nn.Module, projections: list[DipProjection]) -> None:
        num_channels = sum(projection.site.num_channels for projection in projections)
        num_tokens = min(_MAX_TOKENS, max(_MIN_TOKENS, _MAX_VALUES // num_channels))
        self._model: Any = model
        self._projections = projections
        self._samples = [TokenSample(math.ceil(num_tokens / num_processes())) for _ in projections]
        self._watching = False
        self._masks: dict[str, torch.Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look at what enters the sites while batches are watched."""
        for projection, sample in zip(self._projections, self._samples, strict=True):
            projection.observer = partial(self._observe, projection.site, sample)
        try:
            yield
        finally:
            for projection in self._projections:
                projection.observer = None

    def watch(self, batches: Iterable) -> Iterator[Any]:
        """Pass the batches on, and note which tokens of each are padding."""
        for batch in batches:
            self._masks, self._watching = _masks_of(batch), True
            yield batch
            self._watching = False

    def _observe(self, site: Site, sample: "TokenSample", x: torch.Tensor) -> None:
        if not self._watching:
            return
        if x.shape[site.channel_dim] != site.num_channels:
            raise ValueError(
                f"Site '{site.name}' should have {site.num_channels} channels along dimension {site.channel_dim}, and "
                f"its input has the shape {tuple(x.shape)}. Name another module as the site."
            )
        sample.add(tokens_of(x, site.channel_dim, self._masks_for(site)))

    def _masks_for(self, site: Site) -> list[torch.Tensor]:
        """The masks that a site's tokens may have: in a decoder its own, then the encoder's, for what it reads."""
        names = ["attention_mask"]
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            inside = any(module is self._model.get_encoder() for module in _hosts(self._model, site.name))
            names = ["attention_mask"] if inside else ["decoder_attention_mask", "labels", "attention_mask"]
        return [self._masks[name] for name in names if name in self._masks]

    def scales(self) -> list[torch.Tensor]:
        """The sites' scales, float32 of shape `(D,)` each, the same on every process.

        Raises:
            ValueError: a site never ran, its input is not finite, or all its channels are constant.
        """
        scales, fewest = [], _FEW_TOKENS
        for projection, sample in zip(self._projections, self._samples, strict=True):
            name, device = projection.site.name, projection.scale.device
            tokens_ND = sample.gather(projection.site.num_channels, device)
            _check_tokens(name, tokens_ND)
            scale_D = channel_scale(tokens_ND)
            if not (scale_D > 0).all():
                raise ValueError(
                    f"Nine in ten tokens have one value in every channel of the input of site '{name}', so it tells "
                    'no scale. Choose other sites, or noise_scale="absolute".'
                )
            scales.append(scale_D)
            fewest = min(fewest, len(tokens_ND))
        if fewest < _FEW_TOKENS:
            warnings.warn(
                f"A site was calibrated on {fewest} tokens without padding. The median of so few is off by more than "
                f"a tenth: give batches with at least {_FEW_TOKENS}.",
                stacklevel=4,
            )
        return scales


class TokenSample:
    """Keeps a uniform random sample of the tokens added to it: those with the smallest of random numbers.

    Args:
        size (`int`): the most tokens it keeps.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._generator = torch.Generator("cpu").manual_seed(0)  # all sites keep the same tokens, in every run
        self._numbers_N = torch.empty(0, device="cpu")
        self._tokens_ND: torch.Tensor | None = None

    def add(self, tokens_ND: torch.Tensor) -> None:
        """Add tokens, and let go of those that are too many."""
        if self._tokens_ND is None:
            self._tokens_ND = tokens_ND[:0]
        num_kept = len(self._numbers_N)
        numbers = torch.rand(len(tokens_ND), generator=self._generator, device="cpu")
        numbers = torch.cat([self._numbers_N, numbers])
        chosen = numbers.argsort()[: self._size].sort().values
        kept, added = chosen[chosen < num_kept], chosen[chosen >= num_kept] - num_kept
        self._tokens_ND = torch.cat([self._tokens_ND[kept], tokens_ND[added]])
        self._numbers_N = numbers[chosen]

    def gather(self, num_channels: int, device: torch.device) -> torch.Tensor:
        """The tokens of all processes, float32 of shape `(N, D)`, on `device`."""
        own = torch.empty(0, num_channels) if self._tokens_ND is None else self._tokens_ND
        own = own.to(device=device, dtype=torch.float32)
        if num_processes() == 1:
            return own
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(num_processes())]
        torch.distributed.all_gather(counts, torch.tensor([len(own)], device=device))
        padded = own.new_zeros(self._size, num_channels)
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([tokens[: int(count)] for tokens, count in zip(gathered, counts, strict=True)])


def tokens_of(x: torch.Tensor, channel_dim: int, masks: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Lay out a site's input as tokens of shape `(N, D)`, without those that are padding.

    Args:
        x (`torch.Tensor`): rows and length may be any two dimensions that are neighbours without the channels, in
            either order (XLNet has the length first, Gemma 3n its streams), or one, as for an expert's input.
        channel_dim (`int`): the channels' dimension.
        masks (`Sequence[torch.Tensor]`): of shape `(B, L)`, 0 for padding; the first that fits is taken. An input of
            other rows, such as an image's patches, has no padding.
    """
    x = x.movedim(channel_dim, -1)
    for mask_BL in masks:
        mask_BL = mask_BL.to(x.device).bool()
        if x.dim() == 2 and len(x) == mask_BL.numel():
            return x[mask_BL.flatten()]
        for dim in range(x.dim() - 2):
            for mask in (mask_BL, mask_BL.T):
                if mask.shape == x.shape[dim : dim + 2]:
                    return x.movedim((dim, dim + 1), (0, 1))[mask].flatten(0, -2)
    return x.flatten(0, -2)


def channel_scale(tokens_ND: torch.Tensor) -> torch.Tensor:
    """The scale of every channel, of shape `(D,)`: 1.4826 times the median absolute deviation over the tokens.

    Where more than half of the tokens have one value, as after a ReLU, that is 0, and the 0.9 quantile stands for the
    median. A channel that hardly changes gets 0.01 of the site's typical scale, the median over the channels that do
    change. Zeros if none does.
    """
    deviations_ND = (tokens_ND - _quantile(tokens_ND, 0.5)).abs()
    scale_D = _quantile(deviations_ND, 0.5) / _WIDTH_OF_50
    if (sparse := scale_D == 0).any():
        scale_D[sparse] = _quantile(deviations_ND[:, sparse], 0.9) / _WIDTH_OF_90
    changing = scale_D[scale_D > 0]
    return scale_D.clamp(min=_FLOOR * _quantile(changing, 0.5)) if len(changing) else scale_D


def _quantile(values_ND: torch.Tensor, part: float) -> torch.Tensor:
    """The lower quantile over the tokens, by sorting: CUDA's `median` and `kthvalue` are not deterministic."""
    return values_ND.sort(dim=0).values[math.ceil(part * len(values_ND)) - 1]


def _check_tokens(name: str, tokens_ND: torch.Tensor) -> None:
    if not len(tokens_ND):
        raise ValueError(
            f"Site '{name}' never ran in the calibration. Give at least one batch that reaches it (an expert of a "
            "mixture may need more), or leave it out of the sites."
        )
    if not torch.isfinite(tokens_ND).all():
        raise ValueError(
            f"The input of site '{name}' is not finite in the calibration. Check the batches, and the model's output "
            "on them, for NaN and infinity; float16 overflows where bfloat16 does not."
        )


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
    mean_loss: MeanLoss,
    draw_labels: DrawLabels,
) -> None:
    """Set the scale of the sites and, where it is to be found, the std at which their variances begin.

    See `DipModel.calibrate`. A level that was given as a number is tried, and warned of if it costs more than a nat.

    Args:
        model (`nn.Module`): the network.
        config (`DipConfig`): of the adapter.
        projections (`list[DipProjection]`): its sites.
        batches (`list`): model inputs.
        mean_loss (`Callable`): `(batches, noise)` to the mean loss with noise off or on, None where there is none.
        draw_labels (`Callable`): `(batch, seed)` to the batch with labels from the model's own predictions.
    """
    if config.noise_scale == "absolute" and config.init_noise_std != "auto":
        raise ValueError(
            'noise_scale="absolute" has nothing to calibrate: its scale is 1, and init_noise_std was given.'
        )
    finds_level = any(not projection.level_is_known for projection in projections)
    before = [projection.noise_state() for projection in projections]
    try:
        with evaluating(model):
            meter = ScaleMeter(model, projections)
            with meter.attached():
                loss = mean_loss(meter.watch(batches), noise=False)
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
                batches = [draw_labels(batch, seed) for seed, batch in enumerate(batches)]
                _find_level(projections, batches, mean_loss, config.init_loss_increase)
            elif loss is not None and config.init_noise_std:
                _warn_of_high_level(loss, _noisy_loss(projections, batches, mean_loss))
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


def _find_level(projections: list[DipProjection], batches: list, mean_loss: MeanLoss, increase: float) -> None:
    def loss_at(std: float) -> float:
        for projection in projections:
            projection.set_noise(std=std)
        return _noisy_loss(projections, batches, mean_loss)

    loss = _known(mean_loss(batches, noise=False))
    std, noisy_loss = find_std(loss_at, loss, increase)
    for projection in projections:
        projection.set_noise(std=std)
    _logger.info("Noise level %.3g found: loss of the model's own answers %.4g -> %.4g", std, loss, noisy_loss)


def _noisy_loss(projections: list[DipProjection], batches: list, mean_loss: MeanLoss) -> float:
    """The loss with noise, the mean of two passes of opposite noise.

    What is linear in the noise cancels. It is the largest part by far, and says nothing of what noise costs.
    """
    losses = []
    for _ in range(2):
        losses.append(mean_loss(batches, noise=True))
        for projection in projections:
            projection.set_noise(scale=-projection.scale)
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
    mean_loss: MeanLoss,
) -> list[dict[str, Any]]:
    """Measure the loss at each of `stds`, with noise at all sites and at each alone; see `DipModel.noise_sweep`."""
    if not all(math.isfinite(std) and std > 0 for std in stds):
        raise ValueError(f"The stds of a sweep must be positive and finite, got {list(stds)}.")
    before = [projection.noise_state() for projection in projections]
    try:
        with evaluating(model):
            loss = mean_loss(batches, noise=False)
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
                    rows.append({"site": site, "std": std, "loss": _noisy_loss(projections, batches, mean_loss)})
    finally:
        for projection, state in zip(projections, before, strict=True):
            projection.restore_noise(state)
    return rows


def _known(loss: float | None) -> float:
    assert loss is not None  # batches that had a loss without noise have one with it
    return loss


def _masks_of(batch: Any) -> dict[str, torch.Tensor]:
    """Which tokens of a batch count, by the entry that tells it."""
    if not isinstance(batch, Mapping):
        return {}
    masks = {name: batch.get(name) for name in ("attention_mask", "decoder_attention_mask")}
    if isinstance(batch.get("labels"), torch.Tensor):
        masks["labels"] = batch["labels"] != IGNORE_INDEX
    return {name: mask for name, mask in masks.items() if isinstance(mask, torch.Tensor) and mask.dim() == 2}


def _hosts(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that contain the one called `name`, from the outside in."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]


def num_processes() -> int:
    """How many processes take part in the calibration."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
