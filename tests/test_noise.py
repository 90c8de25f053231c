"""The operator of eq. (1): statistics of the draws, gradients, memory, keys. Noise by position, by definition."""

import math
import pickle

import pytest
import torch

from dipnet_hf.noise import BLOCK_LENGTH, PositionNoise, draw_noise, fold_in, locate, new_key, project
from tests.helpers import noise_by_definition

SHAPES = [(1, 1, 1), (3, 7, 5), (2, 64, 33)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def key(n=0):
    return torch.tensor(n, dtype=torch.int64)


def reference(x, logvar, scale, key, antithetic=False):
    """Eq. (1) with the noise in the open."""
    return x + scale * torch.exp(logvar / 2) * draw_noise(x, key, antithetic).to(x.dtype)


def test_mean_and_std_by_channel():
    x = torch.linspace(-3, 3, 4).expand(20_000, 4)
    logvar = torch.tensor([-4.0, -1.0, 0.0, 2.0])
    scale = torch.tensor(0.7)
    u = project(x, logvar, scale, key())
    std = scale * torch.exp(logvar / 2)
    n = len(x)
    assert ((u.mean(0) - x[0]).abs() < 5 * std / math.sqrt(n)).all()
    assert ((u.std(0) / std - 1).abs() < 5 / math.sqrt(2 * n)).all()


def test_noise_is_standard_normal_and_white():
    eps = draw_noise(torch.empty(64, 128, 16), key(3))
    n = eps.numel()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(eps.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for dim in range(3):  # rows, tokens and channels
        a, b = eps.narrow(dim, 0, eps.shape[dim] - 1), eps.narrow(dim, 1, eps.shape[dim] - 1)
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel()), dim


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("per_channel", [True, False])
def test_forward_and_gradients_equal_the_reference(shape, dtype, per_channel):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    logvar = torch.randn(shape[-1] if per_channel else 1)
    weight = torch.randn(shape, dtype=dtype)
    results = []
    for function, work_dtype in [(project, dtype), (reference, torch.float64)]:
        x_ = x.detach().to(work_dtype).requires_grad_()
        logvar_ = logvar.detach().to(torch.float32 if function is project else torch.float64).requires_grad_()
        u = function(x_, logvar_, torch.tensor(0.3, dtype=logvar_.dtype), key(5))
        (u * weight.to(work_dtype)).sum().backward()
        results.append([u.double(), x_.grad.double(), logvar_.grad.double()])
        assert u.dtype == work_dtype and logvar_.grad.shape == logvar.shape
    tolerance = max(TOLERANCE[dtype], 1e-5)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_gradients_equal_finite_differences_at_fixed_noise():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    logvar = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, v: project(x, v, scale, key(1)).square(), (x, logvar))


def test_gradient_is_the_analytic_form():
    x = torch.zeros(6, 4, requires_grad=True)
    logvar = torch.tensor([0.0, -1.0, 1.0, 2.0], requires_grad=True)
    scale = torch.tensor(0.5)
    grad_u = torch.randn(6, 4)
    project(x, logvar, scale, key(2)).backward(grad_u)
    eps = draw_noise(x, key(2))
    assert torch.equal(x.grad, grad_u)
    torch.testing.assert_close(logvar.grad, (grad_u * eps).sum(0) * scale * torch.exp(logvar.detach() / 2) / 2)


def test_channels_of_an_image_are_dimension_one():
    x = torch.zeros(4, 3, 40, 50)
    logvar = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    u = project(x, logvar, torch.tensor(1.0), key(), channel_dim=1)
    std = u.detach().transpose(0, 1).flatten(1).std(1)
    assert ((std / torch.exp(logvar.detach() / 2) - 1).abs() < 5 / math.sqrt(2 * 8000)).all()
    u.sum().backward()
    expected = draw_noise(x, key()).sum((0, 2, 3)) * torch.exp(logvar.detach() / 2) / 2
    torch.testing.assert_close(logvar.grad, expected, atol=1e-3, rtol=1e-4)


def test_antithetic_halves_are_opposite_and_unbiased():
    x = torch.randn(6, 5)
    u = project(x, torch.zeros(5), torch.tensor(1.0), key(), antithetic=True)
    torch.testing.assert_close(u[:3] - x[:3], -(u[3:] - x[3:]))
    assert not torch.equal(u[0] - x[0], u[1] - x[1])


def test_antithetic_gradient_equals_the_reference():
    x, logvar = torch.randn(4, 7, 3), torch.randn(3)
    grads = []
    for function in (project, reference):
        leaf = logvar.clone().requires_grad_()
        function(x, leaf, torch.tensor(0.2), key(4), True).pow(3).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_zero_variance_is_the_identity():
    x = torch.randn(3, 4)
    assert torch.equal(project(x, torch.full((4,), -math.inf), torch.tensor(1.0), key()), x)


def test_no_noise_is_kept_for_the_backward_pass():
    """The tensors saved by a chain of projections do not grow with the batch: the noise would."""

    def saved_bytes(rows, function):
        saved = []
        x = torch.randn(rows, 32, 64, requires_grad=True)
        logvar = torch.zeros(64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * t.element_size()), id):
            for n in range(3):
                x = function(x, logvar, torch.tensor(0.1), key(n))
        return sum(saved)

    assert saved_bytes(1, project) == saved_bytes(64, project) < 3 * 1024
    noise_bytes = 64 * 32 * 64 * 4
    assert saved_bytes(64, reference) >= 3 * noise_bytes


def test_a_draw_is_a_function_of_its_key_alone():
    x = torch.randn(4, 6)
    args = (torch.zeros(6), torch.tensor(1.0))
    first = project(x, *args, key(7))
    torch.manual_seed(123)
    torch.randn(10)
    assert torch.equal(project(x, *args, key(7)), first)
    assert not torch.equal(project(x, *args, key(8)), first)
    # bfloat16 gets the same draw, rounded
    torch.testing.assert_close(project(x.bfloat16(), *args, key(7)).float(), first, atol=2e-2, rtol=2e-2)


def test_keys_are_decorrelated_and_distinct():
    keys = fold_in(fold_in(key(0), torch.arange(300)[:, None]), torch.arange(300))
    assert keys.unique().numel() == 90_000
    noise = torch.stack([draw_noise(torch.empty(2000), k) for k in fold_in(key(1), torch.arange(20))])
    correlation = torch.corrcoef(noise) - torch.eye(20)
    assert correlation.abs().max() < 5 / math.sqrt(2000)


def test_fold_in_is_splitmix64():
    """Against the published generator in arbitrary-precision integers."""
    mask = (1 << 64) - 1

    def splitmix(state):
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    for seed, data in [(0, 0), (1, 5), (-3, 12), (2**62, 999)]:
        expected = splitmix((seed + (data + 1) * 0x9E3779B97F4A7C15) & mask)
        assert int(fold_in(key(seed), data)) % 2**64 == expected


def test_new_key_follows_the_global_seed():
    torch.manual_seed(0)
    first, second = new_key(), new_key()
    torch.manual_seed(0)
    assert torch.equal(new_key(), first) and not torch.equal(first, second)


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logvar has shape \(5,\) but x has shape \(2, 3, 4\)"):
        project(torch.zeros(2, 3, 4), torch.zeros(5), torch.tensor(1.0), key())
    with pytest.raises(ValueError, match="even number of rows, got 3"):
        draw_noise(torch.zeros(3, 4), key(), antithetic=True)
    with pytest.raises(ValueError, match="floating-point input, got torch.int64"):
        project(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(4), torch.tensor(1.0), key())


def test_the_operators_are_registered_soundly():
    """Schema, fake kernels and autograd, as torch.compile relies on them."""
    x = torch.randn(4, 6, requires_grad=True)
    logvar = torch.zeros(6, requires_grad=True)
    args = (x, logvar, torch.tensor(0.5), key(3), True, -1)
    torch.library.opcheck(torch.ops.dipnet_hf.project.default, args)
    torch.library.opcheck(torch.ops.dipnet_hf.fold_in.default, (key(3), torch.arange(4)))


# ---- noise by position ----


def position_noise(num_samples=4, first=0, length=200, size=16, key=0):
    noise = PositionNoise(torch.tensor(key), num_samples)
    return noise.at(locate(torch.arange(first, first + length)[None], torch.device("cpu")), size, torch.device("cpu"))


def test_position_noise_is_standard_normal_and_independent():
    eps = position_noise(num_samples=8, length=4096)[:, 0]
    n = eps.numel()
    assert abs(eps.mean()) < 5 / math.sqrt(n)
    assert abs(eps.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(eps.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for dim in range(3):  # samples, positions, channels
        neighbours = eps.narrow(dim, 1, eps.shape[dim] - 1) * eps.narrow(dim, 0, eps.shape[dim] - 1)
        assert abs(neighbours.mean()) < 5 / math.sqrt(neighbours.numel())
    blocks = eps[:, :-BLOCK_LENGTH] * eps[:, BLOCK_LENGTH:]
    assert abs(blocks.mean()) < 5 / math.sqrt(blocks.numel())
    assert abs((eps * position_noise(num_samples=8, length=4096, key=1)[:, 0]).mean()) < 5 / math.sqrt(n)


def test_a_samples_noise_does_not_depend_on_the_others_nor_on_the_way_there():
    whole = position_noise(num_samples=8)
    assert torch.equal(position_noise(num_samples=3), whole[:3])
    assert torch.equal(position_noise(first=70, length=50), whole[:4, :, 70:120])
    noise, cpu = PositionNoise(torch.tensor(0), 4), torch.device("cpu")
    steps = [noise.at(locate(torch.tensor([[t]]), cpu), 16, cpu) for t in range(200)]
    assert torch.equal(torch.cat(steps, dim=2), whole[:4])
    rows = torch.tensor([[0, 0, 1, 2], [150, 151, 152, 153], [31, 32, 33, 64]])
    assert torch.equal(noise.at(locate(rows, cpu), 16, cpu), whole[:4, 0][:, rows])


def test_position_noise_by_definition():
    expected = torch.stack([noise_by_definition(7, 3, 1, t, 16) for t in range(200)])
    noise = PositionNoise(fold_in(torch.tensor(7), 3), 2)
    cpu = torch.device("cpu")
    assert torch.equal(noise.at(locate(torch.arange(200)[None], cpu), 16, cpu)[1, 0], expected)


@pytest.mark.parametrize("starts", [[0], [0, 5, 40]], ids=["one place", "rows at different places"])
def test_the_memory_of_noise_by_position_does_not_grow_with_the_text(starts):
    noise, cpu = PositionNoise(key(), 2), torch.device("cpu")
    sizes = []
    for step in range(6 * BLOCK_LENGTH):
        noise.at(locate(torch.tensor(starts)[:, None] + step, cpu), 16, cpu)
        sizes.append(len(pickle.dumps(noise)))
    block_bytes = 2 * BLOCK_LENGTH * 16 * 4
    assert block_bytes < max(sizes) < (len(starts) + 0.5) * block_bytes


def test_noise_by_position_keeps_no_more_of_a_prompt_than_its_end():
    noise, cpu = PositionNoise(key(), 2), torch.device("cpu")
    noise.at(locate(torch.arange(6 * BLOCK_LENGTH)[None], cpu), 16, cpu)
    assert len(pickle.dumps(noise)) < 1.5 * 2 * BLOCK_LENGTH * 16 * 4
