"""The Triton kernels, in Triton's interpreter (see `conftest.py`) or compiled on a GPU: noise, forward, gradient."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")
from dipnet_hf import noise
from dipnet_hf.kernels import projection as kernels

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KEY = 0x1234_5678_9ABC_DEF0
SHAPES = [(1, 1, 1), (3, 7, 5), (2, 64, 33), (4, 1023), (6, 3, 130), (2, 1100)]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def the_operator_uses_the_kernels(monkeypatch):
    """On a CPU it never chooses them by itself: Triton's interpreter is for tests."""
    monkeypatch.setattr(noise, "_kernels", lambda x, channel_dim: kernels)


def kernel_noise(shape, key=KEY, antithetic=False):
    return kernels.project(torch.zeros(shape, device=DEVICE), torch.ones(1, device=DEVICE), key, antithetic)


def philox(key, row, group, num_rounds):
    """Philox4x32 by its definition, for one row and group of columns."""
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    state = [group, row, 0, 0]
    for _ in range(num_rounds):
        products = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
        state = [
            (products[1] >> 32) ^ state[1] ^ keys[0],
            products[1] & 0xFFFFFFFF,
            (products[0] >> 32) ^ state[3] ^ keys[1],
            products[0] & 0xFFFFFFFF,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return state


def slow_noise(num_rows, hidden_size, key):
    """Box and Muller's normals of four neighbours in a row from one Philox counter."""
    rows = []
    for row in range(num_rows):
        values = []
        for group in range(math.ceil(hidden_size / 4)):
            words = philox(key, row, group, 7)
            for a, b in (words[:2], words[2:]):
                radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
                turn = math.pi * np.uint32(b).view(np.int32) / 2**31
                values += [radius * math.cos(turn), radius * math.sin(turn)]
        rows.append(values[:hidden_size])
    return torch.tensor(rows)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33)])
@pytest.mark.parametrize("key", [0, KEY, 2**63 - 1, -KEY])
def test_the_noise_is_philox(shape, key):
    tolerance = 1e-3 if kernels._APPROXIMATE else 2e-6
    torch.testing.assert_close(kernel_noise(shape, key).cpu(), slow_noise(*shape, key), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("antithetic", [True, False])
def test_forward_and_gradients_equal_the_reference(shape, dtype, per_channel, antithetic):
    if antithetic and shape[0] % 2:
        shape = (2 * shape[0], *shape[1:])
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
    logvar = torch.randn(shape[-1] if per_channel else 1, device=DEVICE, requires_grad=True)
    scale, weight = torch.tensor(0.3, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
    u = noise.project(x, logvar, scale, torch.tensor(KEY), antithetic)
    u.backward(weight)
    eps = kernel_noise(shape, antithetic=antithetic)
    if antithetic:
        assert torch.equal(eps[: shape[0] // 2], -eps[shape[0] // 2 :])
    std = scale * torch.exp(logvar.detach() / 2)
    tolerance = TOLERANCE[dtype]
    assert u.dtype == dtype
    torch.testing.assert_close(u.float(), x.detach().float() + std * eps, atol=tolerance, rtol=tolerance)
    assert torch.equal(x.grad, weight)
    expected = (weight.float() * eps * std / 2).flatten(0, -2).sum(0).sum_to_size(logvar.shape)
    torch.testing.assert_close(logvar.grad, expected, atol=1e-4, rtol=1e-5)


def test_moments_and_independence():
    eps = kernel_noise((16, 64, 32))
    n = eps.numel()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(eps.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for dim in range(3):
        for lag in (1, 2, 3):  # within a group of four too
            a, b = eps.narrow(dim, 0, eps.shape[dim] - lag), eps.narrow(dim, lag, eps.shape[dim] - lag)
            assert abs((a * b).mean()) < 5 / math.sqrt(a.numel()), (dim, lag)
            assert abs((a.square() * b.square()).mean() - 1) < 5 * math.sqrt(8 / a.numel()), (dim, lag)


@pytest.mark.parametrize("other", [KEY + 1, KEY + 2**32, KEY + 2**62])
def test_all_bits_of_a_key_count(other):
    a, b = kernel_noise((32, 64)), kernel_noise((32, 64), other)
    assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())
    assert torch.equal(a, kernel_noise((32, 64)))


def test_the_noise_does_not_depend_on_dtype_or_layout():
    x = torch.zeros(8, 6, 5, device=DEVICE)
    std = torch.ones(1, device=DEVICE)
    eps = kernels.project(x, std, KEY, False)
    # The interpreter rounds to bfloat16 toward zero.
    torch.testing.assert_close(kernels.project(x.bfloat16(), std, KEY, False).float(), eps, atol=0, rtol=2**-7)
    for other in (torch.zeros(5, 6, 8, device=DEVICE).transpose(0, 2), x[:1, :1].expand(8, 6, 5)):
        u = kernels.project(other, std, KEY, False)
        assert torch.equal(u, eps) and u.stride() == torch.empty_like(other).stride()


def test_the_gradient_of_an_expanded_tensor():
    grad = torch.ones(1, 1, 5, device=DEVICE).expand(8, 6, 5)
    expected = kernel_noise((8, 6, 5)).flatten(0, 1).sum(0)
    torch.testing.assert_close(kernels.noise_gradient(grad, KEY, False), expected, atol=1e-5, rtol=1e-5)


def test_odd_rows_have_no_pairs():
    x, logvar = torch.zeros(3, 4, device=DEVICE), torch.zeros(4, device=DEVICE)
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        noise.project(x, logvar, torch.tensor(1.0, device=DEVICE), torch.tensor(1), antithetic=True)


def test_a_tensor_without_elements():
    x = torch.zeros(0, 4, device=DEVICE)
    assert kernels.project(x, torch.ones(4, device=DEVICE), KEY, False).shape == (0, 4)
    assert torch.equal(kernels.noise_gradient(x, KEY, False), torch.zeros(4, device=DEVICE))


@pytest.mark.skipif(not find_spec("triton.backends.nvidia"), reason="this Triton compiles for no NVIDIA GPU")
@pytest.mark.parametrize("capability", [80, 90])
def test_they_compile_for_gpus_and_use_registers_alone(capability):
    """In a process of its own: here Triton interprets."""
    program = (
        "from benchmarks.instructions import compile_kernel\n"
        "for direction in ('forward', 'backward'):\n"
        "    for antithetic in (False, True):\n"
        f"        print(compile_kernel(direction, {capability}, antithetic, approximate=True).asm['ptx'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count(f".target sm_{capability}") == 4
    assert done.stdout.count("sin.approx") == done.stdout.count("lg2.approx") > 0
    assert ".local" not in done.stdout


@pytest.mark.gpu
def test_training_on_a_gpu_uses_the_kernels(monkeypatch):
    monkeypatch.undo()
    x = torch.zeros(4, 8, device="cuda")
    u = noise.project(x, torch.zeros(8, device="cuda"), torch.tensor(1.0, device="cuda"), torch.tensor(KEY))
    assert torch.equal(u, kernel_noise((4, 8)))
