"""Normality normalization against scipy, the paper's layer and hand-made norms, and from the identity on."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import Trainer

from dipnet_hf.regularizers import NormalityNormalization, regularize
from dipnet_hf.regularizers.normality import _change, newton_step, yeo_johnson_change
from tests.helpers import checkpointed, dip_model, logits, losses, make_rows, make_trainer, record
from tests.tiny_models import HIDDEN_SIZE, build, make_batch

MODELS = ["llama", "gemma3_text", "gpt2"]
GENERATOR = np.random.default_rng(0)
SAMPLES = {
    "normal": GENERATOR.normal(size=200),
    "right": GENERATOR.exponential(size=200),
    "left": -(GENERATOR.exponential(size=200) ** 3),
    "heavy": GENERATOR.standard_t(2, size=200),
    "massive": np.append(0.05 * GENERATOR.normal(size=575), 24.0),
    "two": np.array([-1.0, 1.0]),
}


def with_norms(name):
    """A model whose norms have weights and biases of their own."""
    model, generator = build(name), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def lora(name="llama", **settings):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2", **settings)
    return get_peft_model(build(name), config)


def gates(model):
    return [parameter for name, parameter in model.named_parameters() if name.endswith("normality_gate")]


# ---- the transform ----


@pytest.mark.parametrize("lmbda", [-3.0, -1e-4, 0.0, 1e-7, 0.5, 1.0, 1.5, 2.0 - 1e-4, 2.0, 5.0])
def test_the_transform_is_scipys(lmbda):
    x = torch.cat([torch.linspace(-4, 4, 41), torch.tensor([1e-9, -1e-9])]).double()
    expected = torch.from_numpy(stats.yeojohnson(x.numpy(), lmbda))
    found = x + yeo_johnson_change(x, torch.tensor(lmbda, dtype=torch.float64))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)


def test_a_lambda_of_one_changes_nothing_to_the_bit():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 3, 1000)
    assert not yeo_johnson_change(x, torch.tensor(1.0)).any()


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("size", [1.0, 3.0])
def test_the_newton_step_is_that_of_scipys_likelihood(name, size):
    """By finite differences; also where mean and variance are not 0 and 1, as after an RMSNorm."""
    x, h = size * SAMPLES[name] / SAMPLES[name].std(), 1e-4
    below, at, above = (-stats.yeojohnson_llf(lmbda, x) / len(x) for lmbda in (1 - h, 1, 1 + h))
    expected = 1 - (above - below) / (2 * h) / ((above - 2 * at + below) / h**2)
    assert newton_step(torch.from_numpy(x)).item() == pytest.approx(expected, rel=1e-4)


def test_the_transform_makes_samples_more_normal():
    for name in ("right", "left", "heavy"):
        x = torch.from_numpy(SAMPLES[name] / SAMPLES[name].std())
        x = x - x.mean()
        assert stats.shapiro(x + yeo_johnson_change(x, newton_step(x))).statistic > stats.shapiro(x).statistic + 0.1


# Inputs, and what the paper's layer (its code's LayerNorm form, without noise and affine part) makes of them, worked
# out of its formulas; its constants of sqrt(1e-5) beside the curvature and the exponent are the difference to ours.
LAYER = {
    (-1.0, 0.0, 0.5, 1.0, 4.0): (0.0895, [-1.6933, -0.6626, -0.2629, 0.0578, 1.0958]),
    (-6.0, -2.0, -1.0, 0.0, 0.5, 1.5): (1.9430, [-1.1328, -0.2978, 0.0709, 0.5893, 0.9076, 1.6612]),
    (0.1, 0.2, 0.3, 2.0): (-1.1990, [-1.4046, -1.0251, -0.7077, 0.5826]),
}


@pytest.mark.parametrize("inputs", LAYER)
def test_it_is_the_papers_layer(inputs):
    lmbda, outputs = LAYER[inputs]
    norm = torch.nn.LayerNorm(len(inputs))
    x = norm(torch.tensor(inputs))
    assert newton_step(x).item() == pytest.approx(lmbda, abs=0.04)
    torch.testing.assert_close(x + _change(x, None, 0.0), torch.tensor(outputs), atol=0.016, rtol=0)


def test_constant_features_stay_and_are_finite():
    for value in (0.0, 1.0):
        x = torch.full((1, 8), value, requires_grad=True)
        found = _change(x, None, 0.1)
        found.sum().backward()
        assert found.isfinite().all() and x.grad.isfinite().all()
    assert not _change(torch.zeros(1, 8), None, 0.1).any()


def test_gradients_pass_through_the_newton_step():
    """Float64 finite differences, at the identity and away from it, and where a power is near zero."""
    x = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for value in (0.0, 0.7):
        gate = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, gate: _change(x, gate, 0.0), (x, gate))
    for value in (0.0, 2.0, 5e-4, 1.0):
        lmbda = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(yeo_johnson_change, (x, lmbda))


# ---- the noise ----


def test_noise_is_normal_of_the_size_of_the_mean_deviation():
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0)).exp()
    transformed = x + _change(x, None, 0.0)
    size = (transformed - transformed.mean(-1, keepdim=True)).abs().mean(-1, keepdim=True)
    torch.manual_seed(1)
    z = (_change(x, None, 0.3) - _change(x, None, 0.0)) / (0.3 * size)
    assert size.max() > 2 * size.min()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / z.numel()) ** 0.5


def test_the_noises_size_is_a_constant_to_the_gradient():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    with_noise, without = (torch.autograd.grad((_change(x, None, std) * weights).sum(), x)[0] for std in (0.5, 0.0))
    torch.testing.assert_close(with_noise, without)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_checkpointing_draws_the_same_noise(options):
    found = []
    for is_checkpointed in (False, True):
        model, regularizer = build("llama"), NormalityNormalization(noise_std=0.5, start_at_identity=False)
        regularizer.attach(model)
        if is_checkpointed:
            checkpointed(model, options)
        torch.manual_seed(0)
        regularizer.backward(model.train(), make_batch("llama"))
        found.append([parameter.grad for parameter in model.parameters()])
    for gradient, other in zip(*found, strict=True):
        torch.testing.assert_close(gradient, other)


# ---- in a network ----


def rms_norm(x, weight):
    return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("name", MODELS)
def test_in_a_network_it_stands_before_the_affine_part(name):
    """Of a LayerNorm with a bias, of an RMSNorm, and of one that multiplies by 1 + weight."""
    model, regularizer = with_norms(name), NormalityNormalization(start_at_identity=False)
    norm = {"gpt2": lambda: model.transformer.h[1].ln_1}.get(name, lambda: model.model.layers[1].input_layernorm)()
    x = torch.randn(2, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).exp()
    plain = norm(x)
    regularizer.attach(model)
    ones = torch.ones(HIDDEN_SIZE)
    n = F.layer_norm(x, (HIDDEN_SIZE,)) if name == "gpt2" else rms_norm(x, ones)
    factor = norm.weight + (name == "gemma3_text")
    bias = norm.bias if name == "gpt2" else 0.0
    torch.testing.assert_close(plain, n * factor + bias)
    rows = n.flatten(0, 1).double()
    expected = [stats.yeojohnson(row.numpy(), newton_step(row).item()) for row in rows]
    expected = torch.tensor(np.stack(expected), dtype=torch.float32).view_as(x) * factor + bias
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_it_starts_at_the_identity_to_the_bit(name, dtype):
    model, batch = with_norms(name).to(dtype), make_batch(name)
    plain = logits(model, batch)
    NormalityNormalization().attach(model)
    assert torch.equal(logits(model, batch), plain)
    assert not torch.equal(logits(model.train(), batch), plain)
    assert {gate.dtype for gate in gates(model)} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_of_the_hidden_size_has_a_gate_with_a_gradient(name):
    model, regularizer = with_norms(name), NormalityNormalization()
    regularizer.attach(model)
    regularizer.backward(model.train(), make_batch(name))
    assert len(gates(model)) == {"llama": 7, "gemma3_text": 13, "gpt2": 7}[name]  # three layers and the last
    assert all(gate.grad != 0 for gate in gates(model))
    assert not any("q_norm" in name for name in regularizer.state_dict())


def test_gates_and_weights_agree_with_finite_differences():
    """In float64, in GPT-2, which stays in it."""
    model, regularizer, batch = with_norms("gpt2").double(), NormalityNormalization(), make_batch("gpt2")
    regularizer.attach(model)
    parameters = [*gates(model), model.transformer.h[0].ln_1.weight]
    assert len(gates(model)) == 7
    for gate in gates(model):
        gate.data = torch.tensor(0.3, dtype=torch.float64)

    def total():
        return model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.sin().sum()

    gradients = torch.autograd.grad(total(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        ends = []
        for step in (1e-6, -2e-6):
            parameter.data.view(-1)[0] += step
            with torch.no_grad():
                ends.append(total().item())
        parameter.data.view(-1)[0] += 1e-6
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient.view(-1)[0].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("make_model", [lambda: build("llama"), lora], ids=["full", "lora"])
def test_a_resumed_run_is_the_run(tmp_path, make_model):
    """To the bit, with gates that have moved."""

    def trained(checkpoint=None):
        torch.manual_seed(0)
        arguments = dict(save_strategy="steps", save_steps=1, max_steps=2, learning_rate=1e-2)
        trainer = make_trainer(make_model(), make_rows(), tmp_path, Trainer, **arguments)
        regularize(trainer, NormalityNormalization())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    once = trained()
    resumed = trained(str(tmp_path / "checkpoint-1"))
    assert losses(resumed)[-1:] == losses(once)[-1:]
    assert all(gate != 0 for gate in gates(once.model))
    for (name, parameter), other in zip(once.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_beside_dip_both_learn(tmp_path):
    model = dip_model(weights=LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(model, make_rows(), tmp_path, max_steps=1)
    regularize(trainer, NormalityNormalization())
    trainer.train()
    assert all(gate != 0 for gate in gates(model))
    assert any((logvar != logvar[0]).any() for logvar in model.logvars())


def test_saved_gates_come_back(tmp_path):
    model, regularizer = with_norms("llama"), NormalityNormalization()
    regularizer.attach(model)
    for gate in gates(model):
        gate.data += 0.5
    regularizer.save(tmp_path)
    other, fresh = with_norms("llama"), NormalityNormalization()
    fresh.attach(other)
    assert not torch.equal(logits(other), logits(model))
    fresh.load(tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_detach_leaves_no_trace():
    model, regularizer = build("llama"), NormalityNormalization()
    plain, names = logits(model), list(model.state_dict())
    regularizer.attach(model)
    for gate in gates(model):
        gate.data += 0.5
    assert not torch.equal(logits(model), plain)
    regularizer.detach()
    assert torch.equal(logits(model), plain)
    assert list(model.state_dict()) == names


def test_norms_run_as_often_as_before():
    """What others hang on a norm sees every pass once."""
    model = build("llama")
    seen = record(model, ["model.norm"], at_output=True)
    NormalityNormalization().attach(model)
    logits(model)
    assert len(seen["model.norm"]) == 1


@pytest.mark.parametrize("noise_std", [-0.1, math.inf, math.nan])
def test_bad_settings_are_refused(noise_std):
    with pytest.raises(ValueError, match="noise_std of NormalityNormalization must be finite and at least 0, got"):
        NormalityNormalization(noise_std=noise_std)


def test_a_model_without_norms_is_refused():
    with pytest.raises(ValueError, match="a weight of the hidden size, and ResNetForImageClassification has none"):
        NormalityNormalization().attach(build("resnet"))
