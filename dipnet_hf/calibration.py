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
from .projection import DipProjection

MeanLoss = Callable[..., float | None]  # of `(batches, noise)`

_logger = logging.getLogger(__name__)

# Tokens kept per site, over all processes, as far as all sites together stay within `_MAX_VALUES`; never fewer than
# `_MIN_TOKENS`. 32 sites of 4,096 channels keep 512 tokens: 134 MB in bfloat16, 268 MB in float32.
# A channel's scale from 512 tokens is within 5% (one standard error) of that of all tokens.
_MAX_TOKENS, _MIN_TOKENS, _MAX_VALUES = 512, 128, 2**26
_FEW_TOKENS = 64  # a scale from so few is off by 15%
_WIDTH_OF_50, _WIDTH_OF_90 = (
    0.67449,
    1.64485,
)  # standard deviations within which 50% and 90% of a normal distribution lie
_FLOOR = 0.01  # of the site's typical scale; the smallest in SmolLM2-135M is 0.36 of it, in Gemma 3 270M 0.034

_LOWEST_STD, _HIGHEST_STD = 1e-3, 8.0
_MAX_PASSES = 10
_TOLERANCE = 0.05  # of the wanted increase
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
        self._token_mask: torch.Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Look at what enters the sites while batches are watched."""
        for projection, sample in zip(self._projections, self._samples, strict=True):
            projection.observer = partial(self._observe, sample, projection.site.channel_dim)
        try:
            yield
        finally:
            for projection in self._projections:
                projection.observer = None

    def watch(self, batches: Iterable) -> Iterator[Any]:
        """Pass the batches on, and note which tokens of each are padding."""
        for batch in batches:
            self._token_mask, self._watching = self._mask_of(batch), True
            yield batch
            self._watching = False

    def _mask_of(self, batch: Any) -> torch.Tensor | None:
        if not isinstance(batch, Mapping):
            return None
        mask = batch.get("attention_mask")
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
            if mask is None and isinstance(labels, torch.Tensor):
                mask = labels != -100
        return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def _observe(self, sample: "TokenSample", channel_dim: int, x: torch.Tensor) -> None:
        if self._watching:
            sample.add(tokens_of(x, channel_dim, self._token_mask))

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


def tokens_of(x: torch.Tensor, channel_dim: int, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """Lay out a site's input as tokens of shape `(N, D)`, without those that are padding.

    Args:
        x (`torch.Tensor`): rows and length may be any two neighbouring dimensions before the channels, in either order
            (XLNet has the length first, Gemma 3n its streams), or one, as for an expert's input.
        channel_dim (`int`): the channels' dimension.
        mask_BL (`torch.Tensor`, *optional*): of shape `(B, L)`, 0 for padding. An input of other rows, such as an
            image's patches, has no padding.
    """
    if mask_BL is not None:
        mask = mask_BL.to(x.device).bool()
        if x.dim() == 2 and len(x) == mask.numel():
            x = x[mask.flatten()]
        for dim in range(x.dim() - 2):
            layout = next((m for m in (mask, mask.T) if m.shape == x.shape[dim : dim + 2]), None)
            if layout is not None:
                x = x.movedim((dim, dim + 1), (0, 1))[layout]
                break
    return x.movedim(channel_dim, -1).flatten(0, -2)


def channel_scale(tokens_ND: torch.Tensor) -> torch.Tensor:
    """The scale of every channel, of shape `(D,)`: 1.4826 times the median absolute deviation over the tokens.

    Where more than half of the tokens have one value, as after a ReLU, that is 0, and the 0.9 quantile stands for the
    median. A channel that hardly changes gets 0.01 of the site's typical scale, the median over the channels that do
    change. Zeros if none does.
    """
    deviations_ND = (tokens_ND - tokens_ND.median(0).values).abs()
    scale_D = deviations_ND.median(0).values / _WIDTH_OF_50
    if (sparse := scale_D == 0).any():
        quantile = deviations_ND[:, sparse].kthvalue(math.ceil(0.9 * len(tokens_ND)), dim=0).values
        scale_D[sparse] = quantile / _WIDTH_OF_90
    changing = scale_D[scale_D > 0]
    return scale_D.clamp(min=_FLOOR * changing.median()) if len(changing) else scale_D


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
    """Find, by bisection on its logarithm, the noise std at which the loss has risen by `increase`, within 5% of it.

    Args:
        loss_at (`Callable`): std to loss, the same draws every time; it is called at most ten times.
        loss (`float`): without noise.
        increase (`float`): positive.

    Returns:
        `tuple[float, float]`: the std, and the loss at it.

    Raises:
        ValueError: no std between 0.001 and 8 does it.
    """
    low, high = math.log(_LOWEST_STD), math.log(_HIGHEST_STD)
    tried: list[tuple[float, float]] = []
    for _ in range(_MAX_PASSES):
        std = math.exp((low + high) / 2)
        tried.append((std, loss_at(std)))
        risen = tried[-1][1] - loss
        if abs(risen - increase) <= _TOLERANCE * increase:
            return tried[-1]
        if risen < increase:
            low = math.log(std)
        else:  # NaN too: noise that a dtype cannot hold is too much
            high = math.log(std)
    if low == math.log(_LOWEST_STD) or high == math.log(_HIGHEST_STD):
        raise ValueError(
            f"No noise raises the loss of the calibration batches, {loss:.4g}, by init_loss_increase={increase:.4g}: "
            f"at a std of {tried[-1][0]:.4g} it is {tried[-1][1]:.4g}. A model that predicts nothing yet does not "
            "feel noise, nor does one whose sites lead nowhere. Give a number, such as init_noise_std=0.1."
        )
    finite = [pair for pair in tried if math.isfinite(pair[1])]
    return min(finite, key=lambda pair: abs(pair[1] - loss - increase))


def calibrate(
    model: nn.Module, config: DipConfig, projections: list[DipProjection], batches: list, mean_loss: MeanLoss
) -> None:
    """Set the scale of the sites and, with `init_noise_std="auto"`, their variances and `config.init_noise_std`.

    See `DipModel.calibrate`. A level that was given as a number is tried, and warned of if it costs more than a nat.

    Args:
        model (`nn.Module`): the network.
        config (`DipConfig`): of the adapter.
        projections (`list[DipProjection]`): its sites.
        batches (`list`): model inputs.
        mean_loss (`Callable`): `(batches, noise)` to the mean loss with noise off or on, None where there is none.
    """
    finds_level = config.init_noise_std == "auto"
    if config.noise_scale == "absolute" and not finds_level:
        raise ValueError(
            'noise_scale="absolute" has nothing to calibrate: its scale is 1, and init_noise_std was given.'
        )
    before = _noise_of(projections)
    try:
        with evaluating(model):
            meter = ScaleMeter(model, projections)
            with meter.attached():
                loss = mean_loss(meter.watch(batches), noise=False)
            scales = meter.scales() if config.noise_scale == "relative" else [torch.ones(())] * len(projections)
            for projection, scale in zip(projections, scales, strict=True):
                projection.set_noise(scale=scale)
            if finds_level:
                config.init_noise_std = _find_level(projections, batches, mean_loss, loss, config.init_loss_increase)
            elif loss is not None and config.init_noise_std:
                _warn_of_high_level(loss, mean_loss(batches, noise=True))
    except BaseException:
        _set_noise(projections, before)
        raise


def _find_level(
    projections: list[DipProjection], batches: list, mean_loss: MeanLoss, loss: float | None, increase: float
) -> float:
    if loss is None:
        raise ValueError(
            'init_noise_std="auto" finds the level of the noise by the loss of the calibration batches, and they hold '
            "no supervised token. Give batches with labels, or a number, such as init_noise_std=0.1."
        )
    if not math.isfinite(loss):
        raise ValueError(
            f"The loss of the calibration batches is {loss} without any noise, so no level can be found by it. Check "
            "the batches and the model's dtype, or give a number, such as init_noise_std=0.1."
        )

    def loss_at(std: float) -> float:
        for projection in projections:
            projection.set_noise(logvar=2 * math.log(std))
        return _known(mean_loss(batches, noise=True))

    std, noisy_loss = find_std(loss_at, loss, increase)
    for projection in projections:
        projection.set_noise(logvar=2 * math.log(std))
    _logger.info("Noise level %.3g found: loss %.4g -> %.4g", std, loss, noisy_loss)
    return std


def _warn_of_high_level(loss: float, noisy_loss: float | None) -> None:
    if not _known(noisy_loss) - loss <= _HIGH_INCREASE:
        warnings.warn(
            f"The noise raises the loss of the calibration batches from {loss:.4g} to {noisy_loss:.4g}, by more than "
            f"{_HIGH_INCREASE:g} nat per token, and training will have to repair that first. "
            'init_noise_std="auto" finds a level that the model survives.',
            stacklevel=5,
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
    before = _noise_of(projections)
    try:
        with evaluating(model):
            loss = mean_loss(batches, noise=False)
            if loss is None:
                raise ValueError("noise_sweep measures the loss of the batches, and they hold no supervised token.")
            rows: list[dict[str, Any]] = [{"site": "all", "std": 0.0, "loss": loss}]
            for noisy in [projections, *([projection] for projection in projections if per_site)]:
                site = "all" if noisy is projections else noisy[0].site.name
                for projection, (scale, _) in zip(projections, before, strict=True):
                    projection.set_noise(scale=scale if projection in noisy else 0.0)
                for std in stds:
                    for projection in noisy:
                        projection.set_noise(logvar=2 * math.log(std))
                    rows.append({"site": site, "std": std, "loss": mean_loss(batches, noise=True)})
    finally:
        _set_noise(projections, before)
    return rows


def _noise_of(projections: list[DipProjection]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(projection.scale.clone(), projection.logvar.detach().clone()) for projection in projections]


def _set_noise(projections: list[DipProjection], noise: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for projection, (scale, logvar) in zip(projections, noise, strict=True):
        projection.set_noise(scale, logvar)


def _known(loss: float | None) -> float:
    assert loss is not None  # batches that had a loss without noise have one with it
    return loss


def num_processes() -> int:
    """How many processes take part in the calibration."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
