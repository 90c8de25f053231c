"""Keyed Gaussian noise and the projection of eq. (1): pure tensor functions, no module state, no PEFT.

A draw is a pure function of its key and its shape. The backward pass draws it again instead of keeping it.
At inference a token's noise is a pure function of a key, the sample and the token's position: `PositionNoise`.

Shape legend: x is any tensor with D entries along `channel_dim` (batch, sequence, hidden for a transformer).
S samples, R rows, L sequence, D hidden size.
"""

import importlib.util
from types import ModuleType
from typing import NamedTuple

import torch


def new_key() -> torch.Tensor:
    """Draw an int64 scalar key from PyTorch's global CPU generator, so that `set_seed` and a resumed run repeat it."""
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64)


class KeySource:
    """Draws the keys of forward passes: from PyTorch's global generator, or as a function of a seed.

    The process's rank changes the keys, because processes often have the same seed.

    Args:
        seed (`int`, *optional*): makes the keys of the n-th pass a function of it, n and the rank.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = None if seed is None else torch.tensor(seed)
        self._step = torch.tensor(0)

    def next(self, num_sites: int) -> list[torch.Tensor]:
        """Draw the next forward pass's keys, one int64 scalar per site."""
        if self._seed is None:
            key = new_key()
        else:
            key = fold_in(self._seed, self._step)
            self._step = self._step + 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            key = fold_in(key, torch.distributed.get_rank())
        return list(fold_in(key, torch.arange(num_sites)).unbind())


@torch.library.custom_op("dipnet_hf::fold_in", mutates_args=())
def _fold_in(key: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    # splitmix64's finalizer; int64 arithmetic wraps, and the masks make the right shifts logical.
    z = key + (data + 1) * -0x61C8864680B583EB
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@_fold_in.register_fake
def _(key, data):
    return torch.empty(torch.broadcast_shapes(key.shape, data.shape), dtype=torch.int64, device=key.device)


def fold_in(key: torch.Tensor, data: torch.Tensor | int) -> torch.Tensor:
    """Derive a decorrelated key from `key` and `data`, as `jax.random.fold_in` does.

    Args:
        key (`torch.Tensor`): int64.
        data (`torch.Tensor` or `int`): int64, broadcast against `key`; a tensor of n values gives n keys.
    """
    return _fold_in(key, torch.as_tensor(data, dtype=torch.int64, device=key.device))


def draw_noise(x: torch.Tensor, key: torch.Tensor, antithetic: bool = False) -> torch.Tensor:
    """Draw the standard normal noise that `key` stands for, float32, with the shape and on the device of `x`.

    The CPU's generator uses only the low 32 bits of the key. Where Triton runs, `project` draws other noise for the
    same key: that of `kernels.projection`.

    With `antithetic`, the second half of the rows is the negative of the first.

    Raises:
        ValueError: `antithetic` with an odd number of rows.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(key))
    _check_pairs(x, antithetic)
    if not antithetic:
        return torch.randn(x.shape, generator=generator, device=x.device)
    eps = torch.randn(x.shape[0] // 2, *x.shape[1:], generator=generator, device=x.device)
    return torch.cat([eps, -eps])


def _check_pairs(x: torch.Tensor, antithetic: bool) -> None:
    if antithetic and x.shape[0] % 2:
        raise ValueError(
            f"Antithetic noise needs an even number of rows, got {x.shape[0]}. Repeat the batch once per sample, "
            "with an even num_samples, or set sampling='independent'."
        )


class Positions(NamedTuple):
    """The positions of a forward pass's tokens: the blocks they are in, and each token's index into the blocks."""

    blocks: list[int]
    # Into the concatenated blocks; a slice if all rows have the same consecutive positions.
    index_RL: torch.Tensor | slice
    last_blocks: list[int]  # of the rows' last tokens: the next token is in the same block or begins a new one

    def last(self, number: int) -> "Positions":
        """Those of the last tokens alone."""
        index = self.index_RL
        if isinstance(index, slice):
            return self._replace(index_RL=slice(index.stop - number, index.stop))
        return self._replace(index_RL=index[:, -number:])


BLOCK_LENGTH = 32


def locate(positions_RL: torch.Tensor, device: torch.device) -> Positions:
    """Find the blocks of the positions (int64 on the CPU, at least 0) and the tokens' index into them, on `device`."""
    if positions_RL.numel() == 1:  # a decoding step: the operations below would take longer than a site
        block, offset = divmod(int(positions_RL), BLOCK_LENGTH)
        return Positions([block], slice(offset, offset + 1), [block])
    blocks = (positions_RL // BLOCK_LENGTH).unique()
    last_blocks = (positions_RL[:, -1] // BLOCK_LENGTH).unique().tolist()
    start, length = int(positions_RL[0, 0]), positions_RL.shape[1]
    # Without padding all rows have the same positions, and can share one copy of the noise.
    run = torch.arange(start, start + length, device=positions_RL.device)
    if torch.equal(positions_RL, run.expand_as(positions_RL)):
        offset = start % BLOCK_LENGTH
        return Positions(blocks.tolist(), slice(offset, offset + length), last_blocks)
    index = torch.searchsorted(blocks, positions_RL // BLOCK_LENGTH) * BLOCK_LENGTH + positions_RL % BLOCK_LENGTH
    return Positions(blocks.tolist(), index.to(device), last_blocks)


class PositionNoise:
    """Standard normal noise that is a pure function of (key, sample, position), float32.

    It is drawn in blocks of positions, each with a seed of its own. The block of the last token is kept, so that
    decoding draws one block per `BLOCK_LENGTH` tokens.

    Args:
        key (`torch.Tensor`): int64 scalar.
        num_samples (`int`): S. A sample's noise does not depend on S.
    """

    def __init__(self, key: torch.Tensor, num_samples: int) -> None:
        self.key = key
        self._sample_keys = fold_in(key, torch.arange(num_samples, device=key.device))
        self._blocks: dict[int, torch.Tensor] = {}  # of shape (S, 1, BLOCK_LENGTH, D)

    def at(self, positions: Positions, size: int, device: torch.device) -> torch.Tensor:
        """The noise of `size` channels at these positions, of shape `(S, R, L, D)`, or `(S, 1, L, D)` for all rows."""
        blocks = {number: self._block(number, size, device) for number in positions.blocks}
        # The other blocks are dropped: all together they would grow with the text.
        self._blocks = {number: blocks[number] for number in positions.last_blocks}
        noise = torch.cat(list(blocks.values()), dim=2) if len(blocks) > 1 else next(iter(blocks.values()))
        index_RL = positions.index_RL
        if isinstance(index_RL, slice):
            return noise.narrow(2, index_RL.start, index_RL.stop - index_RL.start)
        return noise[:, 0, index_RL.to(device)]

    def whole(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The noise of a whole example without positions, such as an image: of shape `(S, 1, *shape)`."""
        return self._draw(self._sample_keys, shape, device).unsqueeze(1)

    def _block(self, number: int, size: int, device: torch.device) -> torch.Tensor:
        kept = self._blocks.get(number)
        if kept is not None and kept.shape[-1] == size and kept.device == device:
            return kept
        return self._draw(fold_in(self._sample_keys, number), (1, BLOCK_LENGTH, size), device)

    @staticmethod
    def _draw(keys: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        generator = torch.Generator(device=device)
        with torch.inference_mode(False):  # a kept block may be used with gradients later
            noise = torch.empty(len(keys), *shape, device=device)
            for sample, key in zip(noise, keys.tolist(), strict=True):
                sample.normal_(generator=generator.manual_seed(key))
        return noise


def position_noises(seed: int, num_sites: int, num_samples: int) -> list[PositionNoise]:
    """The noise of every site for `num_samples` samples, a function of the seed and the site's number."""
    keys = fold_in(torch.tensor(seed, device="cpu"), torch.arange(num_sites, device="cpu"))
    return [PositionNoise(key, num_samples) for key in keys.unbind()]


def add_noise(x: torch.Tensor, noise: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Eq. (1) with given noise and standard deviation, of shapes that broadcast to that of `x`, in its dtype."""
    return torch.addcmul(x.to(std.dtype), noise.to(std.dtype), std).to(x.dtype)


def shaped_std(x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """The noise's standard deviation, in the accumulation dtype of `x`, shaped to broadcast along `channel_dim`."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return (scale * torch.exp(logvar / 2)).to(torch.promote_types(x.dtype, torch.float32)).view(shape)


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kernels(x: torch.Tensor, channel_dim: int) -> ModuleType | None:
    """The Triton kernels, if they can project `x`. Its gradient gets the same answer, and so the same noise."""
    is_last = channel_dim in (-1, x.dim() - 1)
    if not (x.is_cuda and is_last and x.dtype in _KERNEL_DTYPES and importlib.util.find_spec("triton")):
        return None
    from .kernels import projection

    return projection


@torch.library.custom_op("dipnet_hf::project", mutates_args=())
def _project(
    x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, key: torch.Tensor, antithetic: bool, channel_dim: int
) -> torch.Tensor:
    if kernels := _kernels(x, channel_dim):
        _check_pairs(x, antithetic)
        return kernels.project(x, shaped_std(x, logvar, scale, -1).flatten(), int(key), antithetic)
    return add_noise(x, draw_noise(x, key, antithetic), shaped_std(x, logvar, scale, channel_dim))


@_project.register_fake
def _(x, logvar, scale, key, antithetic, channel_dim):
    return torch.empty_like(x)


@torch.library.custom_op("dipnet_hf::project_logvar_grad", mutates_args=())
def _project_logvar_grad(
    grad_u: torch.Tensor,
    logvar: torch.Tensor,
    scale: torch.Tensor,
    key: torch.Tensor,
    antithetic: bool,
    channel_dim: int,
) -> torch.Tensor:
    if kernels := _kernels(grad_u, channel_dim):
        noise_grad_D = kernels.noise_gradient(grad_u, int(key), antithetic)
    else:
        product = draw_noise(grad_u, key, antithetic).to(torch.promote_types(grad_u.dtype, torch.float32))
        noise_grad_D = product.mul_(grad_u).movedim(channel_dim, -1).flatten(0, -2).sum(0)
    # d u / d logvar = std * eps / 2.
    grad_D = noise_grad_D * shaped_std(grad_u, logvar, scale, channel_dim).flatten() / 2
    return (grad_D if logvar.numel() > 1 else grad_D.sum().reshape(1)).to(logvar.dtype)


@_project_logvar_grad.register_fake
def _(grad_u, logvar, scale, key, antithetic, channel_dim):
    return torch.empty_like(logvar)


def _save_for_backward(ctx, inputs, output):
    _, logvar, scale, key, ctx.antithetic, ctx.channel_dim = inputs
    ctx.save_for_backward(logvar, scale, key)


def _backward(ctx, grad_u):
    grad_logvar = None
    if ctx.needs_input_grad[1]:
        logvar, scale, key = ctx.saved_tensors
        grad_logvar = _project_logvar_grad(grad_u, logvar, scale, key, ctx.antithetic, ctx.channel_dim)
    return grad_u, grad_logvar, None, None, None, None


_project.register_autograd(_backward, setup_context=_save_for_backward)


def project(
    x: torch.Tensor,
    logvar: torch.Tensor,
    scale: torch.Tensor,
    key: torch.Tensor,
    antithetic: bool = False,
    channel_dim: int = -1,
) -> torch.Tensor:
    """Draw u ~ N(x, diag(scale^2 * exp(logvar))), eq. (1), keeping no noise for the backward pass.

    Args:
        x (`torch.Tensor`): the site's input, any float dtype; the result has the same. The sum is done in float32.
        logvar (`torch.Tensor` of shape `(D,)`, or `(1,)` for all): log of the variance over `scale^2`, float32.
        scale (`torch.Tensor` of shape `(D,)`, or a scalar): the unit of the noise, in the units of `x`, float32.
        key (`torch.Tensor`, int64 scalar, on the CPU to spare a synchronisation): the same key gives the same draw.
        antithetic (`bool`): the second half of the rows gets the negative of the first half's noise.
        channel_dim (`int`): the dimension of `x` that `logvar` runs along.

    Raises:
        ValueError: `logvar` and `x` disagree along `channel_dim` (both shapes are given); or `x` holds integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"Noise needs a floating-point input, got {x.dtype}: choose another module as the site.")
    if logvar.numel() not in (1, x.shape[channel_dim]):
        raise ValueError(
            f"logvar has shape {tuple(logvar.shape)} but x has shape {tuple(x.shape)}: logvar must hold one value, or "
            f"{x.shape[channel_dim]}, one per channel along dimension {channel_dim}."
        )
    return _project(x, logvar, scale, key, antithetic, channel_dim)
