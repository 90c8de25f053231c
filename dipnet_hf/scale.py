"""The scale of the noise in every channel of every site, measured on a sample of the tokens that the sites see.

In pretrained language models one token has massive activations and some channels are far larger than the others. Both
would dominate an RMS, so a channel's scale is a median: that of the tokens' distance from their median.

Shape legend: N tokens, D channels of a site.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .architecture import TEXT_INPUTS, is_encoder_decoder
from .batches import IGNORE_INDEX
from .layout import find_token_dims
from .projection import DipProjection

# Tokens kept per site, over all processes: `_MAX_TOKENS`; fewer if all sites together would exceed `_MAX_VALUES`, but
# at least `_MIN_TOKENS`. 32 sites of 4,096 channels keep 512 tokens: 134 MB in bfloat16, 268 MB in float32.
# The standard error of a scale is 5% with 512 tokens, and 15% with 64.
_MAX_TOKENS, _MIN_TOKENS, _MAX_VALUES = 512, 128, 2**26
_FEW_TOKENS = 64
# Standard deviations within which 50% and 90% of a normal distribution lie.
_WIDTH_OF_50, _WIDTH_OF_90 = 0.67449, 1.64485
_FLOOR = 0.01  # of the site's typical scale; the smallest channel of SmolLM2-135M has 0.36, of Gemma 3 270M 0.034


class ScaleMeter:
    """Measures the scale of every channel of every site, from a random sample of the tokens that the sites see.

    Args:
        model (`nn.Module`): the network. With an encoder and a decoder, the masks of a site depend on where it is.
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
        self._is_encoding = False
        self._source: torch.Tensor | None = None  # the encoder's output, which a decoder reads
        self._text_shape: torch.Size | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context in which the sites' inputs are sampled, during the batches that `watch` passes on."""
        for projection, sample in zip(self._projections, self._samples, strict=True):
            projection.observer = partial(self._observe, projection, sample)
        encoder = self._model.get_encoder() if is_encoder_decoder(self._model) else nn.Module()
        hooks = [
            encoder.register_forward_pre_hook(self._begin_source),
            encoder.register_forward_hook(self._end_source),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._source = None
            for projection in self._projections:
                projection.observer = None

    def watch(self, batches: Iterable) -> Iterator[Any]:
        """Pass the batches on, and note which tokens of each are padding."""
        for batch in batches:
            self._masks, self._text_shape, self._watching = _masks_of(batch), _text_shape_of(batch), True
            yield batch
            self._watching = False

    def _observe(self, projection: DipProjection, sample: "TokenSample", x: torch.Tensor) -> None:
        if not self._watching:
            return
        site = projection.site
        if self._text_shape is not None:
            found = find_token_dims(x.movedim(site.channel_dim, -1).shape[:-1], *self._text_shape)
            if len(found) == 1:
                projection.known_dims = found[0]
        sample.add(tokens_of(x, site.channel_dim, self._masks_for(x)))

    def _begin_source(self, module: nn.Module, args: tuple) -> None:
        self._is_encoding = True

    def _end_source(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._is_encoding, self._source = False, output[0]

    def _masks_for(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The masks that a site's tokens may have: those of the source, or a decoder's own.

        Where a decoder has a mask and none fits, what enters the site is made of the source.
        """
        source = [self._masks[name] for name in ("attention_mask",) if name in self._masks]
        if not is_encoder_decoder(self._model) or self._is_encoding or x is self._source:
            return source
        own = [self._masks[name] for name in ("decoder_attention_mask", "labels") if name in self._masks]
        return [*own, *source] if own else []

    def scales(self) -> list[torch.Tensor]:
        """The sites' scales, float32 of shape `(D,)` each, the same on every process.

        Raises:
            ValueError: a site never ran, its input is not finite, or all its channels are constant.
        """
        scales, unused, fewest = [], [], _FEW_TOKENS
        for projection, sample in zip(self._projections, self._samples, strict=True):
            name, device = projection.site.name, projection.scale.device
            tokens_ND = sample.gather(projection.site.num_channels, device)
            if not len(tokens_ND):
                unused.append(name)
                continue
            if not torch.isfinite(tokens_ND).all():
                raise ValueError(
                    f"The input of site '{name}' is not finite in the calibration. Check the batches, and the model's "
                    "output on them, for NaN and infinity; float16 overflows where bfloat16 does not."
                )
            scale_D = channel_scale(tokens_ND)
            if not (scale_D > 0).all():
                raise ValueError(
                    f"In every channel of the input of site '{name}', nine in ten tokens have the same value, so no "
                    'scale can be measured. Choose other sites, or noise_scale="absolute".'
                )
            scales.append(scale_D)
            fewest = min(fewest, len(tokens_ND))
        if unused:
            raise ValueError(
                f"{len(unused)} of {len(self._projections)} sites never ran in the calibration: {unused[:5]}. Give "
                "batches that reach them (an expert of a mixture may need more, a layer that reads images needs one), "
                "or, where the model never calls them, choose layers_to_transform or target_modules without them."
            )
        if fewest < _FEW_TOKENS:
            warnings.warn(
                f"A site was calibrated on only {fewest} tokens (without padding), so its scale is off by more than a "
                f"tenth: give batches with at least {_FEW_TOKENS} tokens.",
                stacklevel=4,
            )
        return scales


class TokenSample:
    """Keeps a uniform random sample of the tokens added to it: each gets a random number, and the smallest stay.

    Args:
        size (`int`): the largest number of tokens it keeps.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._generator = torch.Generator("cpu").manual_seed(0)  # all sites keep the same tokens, in every run
        self._numbers_N = torch.empty(0, device="cpu")
        self._tokens_ND: torch.Tensor | None = None

    def add(self, tokens_ND: torch.Tensor) -> None:
        """Add tokens, and drop some if there are more than `size`."""
        if self._tokens_ND is None:
            self._tokens_ND = tokens_ND[:0]
        num_kept = len(self._numbers_N)
        numbers = torch.rand(len(tokens_ND), generator=self._generator, device="cpu")
        numbers = torch.cat([self._numbers_N, numbers])
        # Sorted, so that the kept tokens come before the added ones, as in `numbers`.
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
        padded = own.new_zeros(self._size, num_channels)  # all_gather needs the same shape in every process
        padded[: len(own)] = own
        gathered = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([tokens[: int(count)] for tokens, count in zip(gathered, counts, strict=True)])


def tokens_of(x: torch.Tensor, channel_dim: int, masks: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Lay out a site's input as tokens of shape `(N, D)`, without those that are padding.

    Args:
        x (`torch.Tensor`): besides the channels, rows and length are two dimensions as in `find_token_dims` (XLNet
            puts the length first, Gemma 3n its streams), or one dimension, as in an expert's input.
        channel_dim (`int`): the channels' dimension.
        masks (`Sequence[torch.Tensor]`): of shape `(B, L)`, 0 for padding; the first that fits is used. If none fits,
            as with an image's patches, no token is padding.
    """
    x = x.movedim(channel_dim, -1)
    for mask_BL in masks:
        mask_BL = mask_BL.to(x.device).bool()
        if x.dim() == 2 and len(x) == mask_BL.numel():
            return x[mask_BL.flatten()]
        for dims in find_token_dims(x.shape[:-1], *mask_BL.shape):
            return x.movedim(dims, (0, 1))[mask_BL].flatten(0, -2)
    return x.flatten(0, -2)


def channel_scale(tokens_ND: torch.Tensor) -> torch.Tensor:
    """The scale of every channel, of shape `(D,)`: 1.4826 times the median absolute deviation over the tokens.

    If more than half of the tokens have the same value, as after a ReLU, that is 0, and the 0.9 quantile replaces the
    median. A channel that hardly changes gets 0.01 of the site's typical scale, which is the median over the channels
    that do change. The result is zero if none does.
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


def _masks_of(batch: Any) -> dict[str, torch.Tensor]:
    """Masks of the tokens that are not padding, by the name of the batch's entry that tells them."""
    if not isinstance(batch, Mapping):
        return {}
    masks = {name: batch.get(name) for name in ("attention_mask", "decoder_attention_mask")}
    if isinstance(batch.get("labels"), torch.Tensor):
        masks["labels"] = batch["labels"] != IGNORE_INDEX
    return {name: mask for name, mask in masks.items() if isinstance(mask, torch.Tensor) and mask.dim() == 2}


def _text_shape_of(batch: Any) -> torch.Size | None:
    """Rows and length of a batch of text."""
    texts = [batch.get(name) for name in TEXT_INPUTS] if isinstance(batch, Mapping) else []
    return next((text.shape[:2] for text in texts if isinstance(text, torch.Tensor)), None)


def num_processes() -> int:
    """How many processes take part in the calibration."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1
