"""The projection of eq. (1) and the gradient of its log-variances, as Triton kernels: noise exists in registers only.

The random bits are Philox's (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a pure function
of the key and an element's row and column. The Box-Muller method makes normals of them. One call gives four normals,
for four neighbours in a row. On NVIDIA's GPUs logarithm, sine and cosine are the hardware's approximations, with
errors of at most 1e-3 of a standard deviation. The exact functions would need four times the instructions, and so more
time than the memory needs for the bytes (`benchmarks/instructions.py`).

Shape legend: R rows (all dimensions but the last), D hidden size. P row pairs: R, or R / 2 with antithetic noise,
where rows r and r + P share one draw. A row's columns are read as G groups of 4 neighbours.
"""

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

# Rounds of Philox: 7 pass BigCrush, according to section 5 of the paper; the usual 10 are a safety margin.
_NUM_ROUNDS = 7
_ROWS_PER_PROGRAM = 64  # of the backward kernel; each program writes one partial sum per channel
_APPROXIMATE = torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1"


@triton.jit
def _normal_pair(a, b, APPROXIMATE: tl.constexpr):
    """Two independent normals from two words of 32 random bits each."""
    uniform = a.to(tl.float32) * 2.0**-32 + 2.0**-33  # in (0, 1]
    turn = b.to(tl.int32, bitcast=True).to(tl.float32) * (3.141592653589793 * 2.0**-31)  # in [-pi, pi]
    if APPROXIMATE:
        log2, cos, sin = libdevice.fast_log2f(uniform), libdevice.fast_cosf(turn), libdevice.fast_sinf(turn)
    else:
        log2, cos, sin = tl.log2(uniform), tl.cos(turn), tl.sin(turn)
    radius = tl.sqrt(tl.maximum(-1.3862943611198906 * log2, 0.0))  # -2 ln(uniform)
    return radius * cos, radius * sin


@triton.jit
def _normals(key, row_P, group_G, NUM_ROUNDS: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Normals of shape `(P, 4 * G)` for every row and group of columns."""
    zero_PG = row_P[:, None] * 0 + group_G[None, :] * 0
    a, b, c, d = tl.philox(key, zero_PG + group_G[None, :], zero_PG + row_P[:, None], zero_PG, zero_PG, NUM_ROUNDS)
    first, second = _normal_pair(a, b, APPROXIMATE)
    third, fourth = _normal_pair(c, d, APPROXIMATE)
    # Side by side in each group: first, second, third, fourth.
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit(do_not_specialize=["key", "num_pairs"])
def _project_kernel(
    x_ptr, std_ptr, u_ptr, key, num_pairs, hidden_size,
    ANTITHETIC: tl.constexpr, PER_CHANNEL: tl.constexpr, NUM_ROUNDS: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row_P = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    group_G = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column_D = tl.program_id(1) * (4 * BLOCK_G) + tl.arange(0, 4 * BLOCK_G)
    std = tl.load(std_ptr + column_D * PER_CHANNEL, mask=column_D < hidden_size, other=0.0)
    offset = _normals(key, row_P, group_G, NUM_ROUNDS, APPROXIMATE) * std[None, :]
    place = row_P[:, None].to(tl.int64) * hidden_size + column_D[None, :]
    mask = (row_P < num_pairs)[:, None] & (column_D < hidden_size)[None, :]
    x = tl.load(x_ptr + place, mask=mask)
    tl.store(u_ptr + place, (x.to(tl.float32) + offset).to(x.dtype), mask=mask)
    if ANTITHETIC:
        place += num_pairs.to(tl.int64) * hidden_size
        x = tl.load(x_ptr + place, mask=mask)
        tl.store(u_ptr + place, (x.to(tl.float32) - offset).to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["key", "num_pairs"])
def _noise_gradient_kernel(
    grad_ptr, partial_ptr, key, num_pairs, hidden_size,
    ANTITHETIC: tl.constexpr, NUM_ROUNDS: tl.constexpr, APPROXIMATE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    group_G = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column_D = tl.program_id(1) * (4 * BLOCK_G) + tl.arange(0, 4 * BLOCK_G)
    total_PD = tl.zeros((BLOCK_P, 4 * BLOCK_G), tl.float32)
    for block in range(NUM_BLOCKS):
        row_P = (tl.program_id(0) * NUM_BLOCKS + block) * BLOCK_P + tl.arange(0, BLOCK_P)
        place = row_P[:, None].to(tl.int64) * hidden_size + column_D[None, :]
        mask = (row_P < num_pairs)[:, None] & (column_D < hidden_size)[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if ANTITHETIC:
            place += num_pairs.to(tl.int64) * hidden_size
            grad -= tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        total_PD += grad * _normals(key, row_P, group_G, NUM_ROUNDS, APPROXIMATE)
    place_D = tl.program_id(0).to(tl.int64) * hidden_size + column_D
    tl.store(partial_ptr + place_D, tl.sum(total_PD, axis=0), mask=column_D < hidden_size)


def _blocks(num_groups: int) -> tuple[int, int]:
    """Row pairs and groups of columns per block: up to 4,096 elements, see `benchmarks/instructions.py`."""
    block_g = min(triton.next_power_of_2(num_groups), 256)
    return 1024 // block_g, block_g


def project(x: torch.Tensor, std: torch.Tensor, key: int, antithetic: bool) -> torch.Tensor:
    """Draw `x + std * eps`, eq. (1), along the last dimension.

    Args:
        x (`torch.Tensor` of shape `(..., D)`): float32, bfloat16 or float16; the sum is done in float32.
        std (`torch.Tensor` of shape `(D,)` or `(1,)`): float32.
        key (`int`): all 64 bits count.
        antithetic (`bool`): the second half of the first dimension gets the negative noise of the first half.
    """
    rows = x.contiguous()
    u = torch.empty_like(rows)
    num_pairs, hidden_size, num_groups = _sizes(x, antithetic)
    block_p, block_g = _blocks(num_groups)
    grid = (triton.cdiv(num_pairs, block_p), triton.cdiv(num_groups, block_g))
    if x.numel():
        with torch.cuda.device_of(x):
            _project_kernel[grid](
                rows, std.contiguous(), u, key, num_pairs, hidden_size,
                ANTITHETIC=antithetic, PER_CHANNEL=std.numel() > 1, NUM_ROUNDS=_NUM_ROUNDS, APPROXIMATE=_APPROXIMATE,
                BLOCK_P=block_p, BLOCK_G=block_g,
            )  # fmt: skip
    return u if rows is x else torch.empty_like(x).copy_(u)  # the strides that a compiler expects


def noise_gradient(grad_u: torch.Tensor, key: int, antithetic: bool) -> torch.Tensor:
    """Sum `grad_u * eps` over all dimensions but the last, with the noise that `project` drew for this key and shape.

    The order of the sum is fixed, so that the result is always the same.

    Returns:
        `torch.Tensor` of shape `(D,)`, float32.
    """
    grad_u = grad_u.contiguous()
    num_pairs, hidden_size, num_groups = _sizes(grad_u, antithetic)
    block_p, block_g = _blocks(num_groups)
    num_blocks = max(1, _ROWS_PER_PROGRAM // block_p)
    grid = (triton.cdiv(num_pairs, block_p * num_blocks), triton.cdiv(num_groups, block_g))
    partial = torch.empty(grid[0], hidden_size, dtype=torch.float32, device=grad_u.device)
    if grad_u.numel():
        with torch.cuda.device_of(grad_u):
            _noise_gradient_kernel[grid](
                grad_u, partial, key, num_pairs, hidden_size,
                ANTITHETIC=antithetic, NUM_ROUNDS=_NUM_ROUNDS, APPROXIMATE=_APPROXIMATE,
                NUM_BLOCKS=num_blocks, BLOCK_P=block_p, BLOCK_G=block_g,
            )  # fmt: skip
    return partial.sum(0)


def _sizes(x: torch.Tensor, antithetic: bool) -> tuple[int, int, int]:
    hidden_size = x.shape[-1]
    num_rows = x.numel() // max(hidden_size, 1)
    return (num_rows // 2 if antithetic else num_rows), hidden_size, triton.cdiv(hidden_size, 4)
