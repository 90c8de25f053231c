"""The scale of every channel, from a sample of the tokens that its site sees."""

import math

import pytest
import torch
from peft import LoraConfig

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf import scale as scale_module
from dipnet_hf.scale import TokenSample, channel_scale, tokens_of
from tests.tiny_models import build, build_with_outliers, make_batch, make_outlier_batch, site_inputs

NORMAL_STD = 1.482602218505602  # 1 / the third quartile of a standard normal


def test_a_channels_scale_is_its_median_absolute_deviation():
    tokens = torch.tensor([[1.0, 0, 7], [2, 0, 7], [3, 50, 7], [4, 100, 7], [1000, 200, 7]])
    expected = torch.tensor([1.0, 50, 0]) * NORMAL_STD
    expected[2] = 0.01 * expected[0]  # constant: a part of the median over the others, the lower of two
    torch.testing.assert_close(channel_scale(tokens), expected, rtol=1e-4, atol=0)
    assert torch.equal(channel_scale(torch.ones(4, 3)), torch.zeros(3))


def test_a_channel_that_is_mostly_zero_has_a_scale_unless_a_massive_token_alone_differs():
    tokens = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    rectified = torch.cat([(tokens - 0.5).relu(), torch.zeros(10_000, 1)], dim=1)
    rectified[0, 2] = 1e4
    scale = channel_scale(rectified)
    # 0.9 of a shifted normal's values are below 1.2816 - 0.5.
    torch.testing.assert_close(scale[:2], torch.tensor([0.7816, 0.7816]) / 1.64485, rtol=0.1, atol=0)
    assert scale[2] == 0.01 * scale[:2].min()


def test_the_scale_of_normal_channels_is_their_standard_deviation():
    tokens = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9) + 100
    standard_error = math.sqrt(1.36 / len(tokens))
    assert ((channel_scale(tokens) / torch.arange(1, 9) - 1).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("target_sites", ["decoder_layer", "attention", "mlp", "linear"])
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_every_channel_of_every_site_is_measured_on_the_base_model(target_sites, granularity):
    other = make_batch("llama")
    other = {**other, "attention_mask": other["attention_mask"].flip(0), "input_ids": other["input_ids"].flip(0)}
    config = DipConfig(weights=LoraConfig(), target_sites=target_sites, granularity=granularity, init_noise_std=0.05)
    model = get_dip_model(build("llama"), config)
    assert model.needs_calibration
    model.train().calibrate([make_batch("llama"), other])
    assert model.get_base_model().training and not model.needs_calibration

    names = [row["name"] for row in model.noise_summary()]
    inputs = site_inputs(build("llama"), names, [make_batch("llama"), other])
    for row in model.noise_summary():
        projection = model.get_base_model().get_submodule(row["name"]).dip_projection
        expected = channel_scale(inputs[row["name"]])
        torch.testing.assert_close(projection.scale, expected, rtol=1e-5, atol=0)
        assert len(projection.logvar) == (len(expected) if granularity == "channel" else 1)
        assert row["scale"] == projection.scale.median() and row["mean"] == pytest.approx(0.05)
    model.train()
    assert dip_loss(model, other).loss.isfinite()


def test_an_embedding_is_measured_at_its_output():
    model = get_dip_model(build("llama"), DipConfig(weights="frozen", target_sites="embedding", init_noise_std=0.05))
    batch = make_batch("llama")
    model.calibrate([batch])
    base = build("llama")
    expected = channel_scale(base.model.embed_tokens(batch["input_ids"])[batch["attention_mask"].bool()])
    torch.testing.assert_close(model.get_base_model().model.embed_tokens.dip_projection.scale, expected)


def test_channels_of_a_convolution_are_its_second_dimension():
    model = get_dip_model(
        build("resnet"), DipConfig(weights="frozen", target_modules=r".*stages\.1.*convolution", init_noise_std=0.05)
    )
    images = make_batch("resnet")
    inputs = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "dip_projection"):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    model.eval().calibrate([{"pixel_values": images["pixel_values"]}])
    assert inputs
    for name, x in inputs.items():
        expected = channel_scale(x.movedim(1, -1).flatten(0, 2))
        torch.testing.assert_close(model.get_base_model().get_submodule(name).dip_projection.scale, expected)


def test_tokens_are_found_wherever_rows_and_length_are():
    mask = [torch.tensor([[1, 1, 1], [1, 0, 0]])]
    tokens = torch.arange(6.0).view(2, 3, 1)
    expected = torch.tensor([0.0, 1, 2, 3])
    assert torch.equal(tokens_of(tokens, -1, mask).flatten(), expected)
    assert torch.equal(tokens_of(tokens.movedim(-1, 1), 1, mask).flatten(), expected)  # channels before the length
    assert torch.equal(tokens_of(tokens, -1, [torch.ones(2, 5), *mask]).flatten(), expected)  # the mask that fits
    assert torch.equal(tokens_of(tokens.transpose(0, 1), -1, mask).flatten().sort().values, expected)  # length first
    streams = torch.stack([tokens, tokens + 10])  # streams first
    assert set(tokens_of(streams, -1, mask).flatten().tolist()) == {0, 1, 2, 3, 10, 11, 12, 13}
    assert torch.equal(tokens_of(tokens.view(6, 1), -1, mask).flatten(), expected)  # an expert's, in one row
    assert tokens_of(torch.ones(2, 7, 4), -1, mask).shape == (14, 4)  # other rows than the text's
    assert tokens_of(torch.ones(2, 4, 5, 6), 1).shape == (60, 4)  # an image


def test_a_sample_of_tokens_is_uniform_and_bounded():
    counts = torch.zeros(100)
    for offset in range(200):
        sample = TokenSample(10)
        sample._generator.manual_seed(offset)
        for part in torch.arange(100.0).view(-1, 1).split([1, 49, 30, 20]):
            sample.add(part)
        kept = sample.gather(1, torch.device("cpu"))
        assert kept.shape == (10, 1) and len(kept.unique()) == 10
        counts[kept.long().flatten()] += 1
    # Each token is kept with probability 0.1.
    assert ((counts - 20).abs() < 5 * math.sqrt(200 * 0.1 * 0.9)).all()


def test_many_tokens_keep_the_memory_of_a_sample(monkeypatch):
    batches = [make_outlier_batch(num_rows=32, seed=seed) for seed in range(4)]
    config = DipConfig(weights="frozen", init_noise_std=0.1)
    monkeypatch.setattr(scale_module, "_MAX_TOKENS", 10_000)
    whole = get_dip_model(build_with_outliers(), config, calibration=batches)
    kept = []
    monkeypatch.setattr(scale_module, "_check_tokens", lambda name, tokens: kept.append(len(tokens)))
    monkeypatch.setattr(scale_module, "_MAX_TOKENS", 256)
    sampled = get_dip_model(build_with_outliers(), config, calibration=batches)
    assert kept == [256] * 3
    for ours, theirs in zip(
        sampled.base_model._projections, whole.base_model._projections, strict=True
    ):  # within five standard errors
        assert ((ours.scale / theirs.scale - 1).abs() < 5 * math.sqrt(1.36 / 256)).all()
    monkeypatch.setattr(scale_module, "_MAX_VALUES", 3 * 32 * 200)
    get_dip_model(build_with_outliers(), config, calibration=batches)
    assert kept[-1] == 200
