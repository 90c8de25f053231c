"""Keyed Gaussian noise and the projection of eq. (1): pure tensor functions, no module state, no PEFT.

A draw is a pure function of its key and its shape. The backward pass draws it again instead of keeping it.

Shape legend: x is any tensor with D entries along `channel_dim` (batch, sequence, hidden for a transformer).
"""

import torch


def new_key() -> torch.Tensor:
    """Draw an int64 scalar key from PyTorch's global CPU generator, so that `set_seed` and a resumed run repeat it."""
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64)


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

    A device's generator takes what it can of the key: the CPU's the low 32 bits.

    With `antithetic`, the second half of the rows is the negative of the first.

    Raises:
        ValueError: `antithetic` with an odd number of rows.
    """
    generator = torch.Generator(device=x.device).manual_seed(int(key))
    if not antithetic:
        return torch.randn(x.shape, generator=generator, device=x.device)
    if x.shape[0] % 2:
        raise ValueError(
            f"Antithetic noise needs an even number of rows, got {x.shape[0]}. Repeat the batch once a sample, "
            "with an even num_samples, or set antithetic=False."
        )
    eps = torch.randn(x.shape[0] // 2, *x.shape[1:], generator=generator, device=x.device)
    return torch.cat([eps, -eps])


def _std(x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """The noise's standard deviation, in the accumulation dtype of `x`, shaped to broadcast along `channel_dim`."""
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    return (scale * torch.exp(logvar / 2)).to(torch.promote_types(x.dtype, torch.float32)).view(shape)


@torch.library.custom_op("dipnet_hf::project", mutates_args=())
def _project(
    x: torch.Tensor, logvar: torch.Tensor, scale: torch.Tensor, key: torch.Tensor, antithetic: bool, channel_dim: int
) -> torch.Tensor:
    std = _std(x, logvar, scale, channel_dim)
    return torch.addcmul(x.to(std.dtype), draw_noise(x, key, antithetic).to(std.dtype), std).to(x.dtype)


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
    std = _std(grad_u, logvar, scale, channel_dim)
    product = draw_noise(grad_u, key, antithetic).to(std.dtype).mul_(grad_u)
    if logvar.numel() == 1:
        summed = product.sum().reshape(1)
    else:
        summed = product.movedim(channel_dim, -1).flatten(0, -2).sum(0)
    return (summed * std.view(-1) / 2).to(logvar.dtype)


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
    """Draw u ~ N(x, scale^2 * diag(exp(logvar))), eq. (1), keeping no noise for the backward pass.

    Args:
        x (`torch.Tensor`): the site's input, any float dtype; the result has the same. The sum is done in float32.
        logvar (`torch.Tensor` of shape `(D,)` or `(1,)`): log of the variance relative to `scale^2`, float32.
        scale (`torch.Tensor`, scalar): the unit of the noise, in the units of `x`.
        key (`torch.Tensor`, int64 scalar, on the CPU to spare a synchronisation): the same key gives the same draw.
        antithetic (`bool`): the second half of the rows gets the negative of the first half's noise.
        channel_dim (`int`): the dimension of `x` that `logvar` runs along.

    Raises:
        ValueError: `logvar` and `x` disagree along `channel_dim` (both shapes are given); or `x` holds integers.
    """
    if not x.is_floating_point():
        raise ValueError(f"Noise needs a floating-point input, got {x.dtype}: name another module as the site.")
    if logvar.numel() not in (1, x.shape[channel_dim]):
        raise ValueError(
            f"logvar has shape {tuple(logvar.shape)} but x has shape {tuple(x.shape)}: logvar must hold one value, or "
            f"{x.shape[channel_dim]}, one a channel along dimension {channel_dim}."
        )
    return _project(x, logvar, scale, key, antithetic, channel_dim)
