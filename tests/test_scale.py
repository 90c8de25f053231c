"""The scale of every channel, from a sample of the tokens that its site sees."""

import math

import pytest
import torch
from peft import LoraConfig
from transformers import T5Config, T5ForConditionalGeneration

from dipnet_hf import DipConfig, dip_loss, get_dip_model
from dipnet_hf import scale as scale_module
from dipnet_hf.scale import TokenSample, channel_scale, tokens_of
from tests.helpers import projections, site_inputs
from tests.tiny_models import build, build_with_outliers, make_batch, make_outlier_batch

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


@pytest.mark.parametrize("source_length", [12, 7])  # another length than the target's, and the same
@pytest.mark.parametrize("target", ["labels", "decoder_attention_mask", None])
def test_a_decoders_padding_is_its_own_and_an_encoders_too(target, source_length):
    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    written = torch.randint(2, 20, (16, 7))
    batch = {"input_ids": torch.randint(2, 20, (16, source_length))}
    batch["attention_mask"] = (torch.arange(source_length) < torch.arange(2, 7).repeat(4)[:16, None]).long()
    source_mask, target_mask = batch["attention_mask"].bool(), (torch.arange(7) < 4).expand(16, 7)
    if target == "labels":
        batch["labels"] = written.where(target_mask, -100)
    else:
        batch["decoder_input_ids"] = written
    if target == "decoder_attention_mask":
        batch["decoder_attention_mask"] = target_mask.long()
    if target is None:  # nothing tells what is padding, certainly not the source's mask
        target_mask = torch.ones_like(target_mask)
    masks = {
        "encoder.block.1.layer.0.SelfAttention.q": source_mask,
        "decoder.block.1.layer.0.SelfAttention.q": target_mask,
        "decoder.block.1.layer.1.EncDecAttention.q": target_mask,
        "decoder.block.1.layer.1.EncDecAttention.k": source_mask,  # reads what the encoder wrote
    }
    model = get_dip_model(
        T5ForConditionalGeneration(config), DipConfig(weights="frozen", target_modules=list(masks), init_noise_std=0.1)
    ).eval()
    base = model.get_base_model()
    inputs = {}
    for name in masks:
        base.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.setdefault(name, args[0])
        )
    model.calibrate([batch])
    for name, mask in masks.items():
        scale = base.get_submodule(name).dip_projection.scale
        torch.testing.assert_close(scale, channel_scale(inputs[name][mask]))


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
    sample = TokenSample(10_000)
    for part in torch.arange(100_000.0).view(-1, 1).split([1, 49_000, 30_000, 20_999]):
        sample.add(part)
    kept = sample.gather(1, torch.device("cpu"))
    assert kept.shape == (10_000, 1) and len(kept.unique()) == 10_000
    # Each token is kept with probability 0.1: of every thousand neighbours a hundred.
    counts = kept.long().flatten().div(1000, rounding_mode="floor").bincount()
    assert len(counts) == 100 and ((counts - 100).abs() < 5 * math.sqrt(1000 * 0.1 * 0.9)).all()


def test_many_tokens_keep_the_memory_of_a_sample(monkeypatch):
    batches = [make_outlier_batch(num_rows=32, seed=seed) for seed in range(4)]
    config = DipConfig(weights="frozen", init_noise_std=0.1)
    # The limits are no setting: without other ones it would take more tokens than a test has.
    monkeypatch.setattr(scale_module, "_MAX_TOKENS", 10_000)
    whole = get_dip_model(build_with_outliers(), config, calibration=batches)
    kept = []

    def count_tokens(tokens_ND):
        kept.append(len(tokens_ND))
        return channel_scale(tokens_ND)

    monkeypatch.setattr(scale_module, "channel_scale", count_tokens)
    monkeypatch.setattr(scale_module, "_MAX_TOKENS", 256)
    sampled = get_dip_model(build_with_outliers(), config, calibration=batches)
    assert kept == [256] * 3
    for ours, theirs in zip(
        projections(sampled).values(), projections(whole).values(), strict=True
    ):  # within five standard errors
        assert ((ours.scale / theirs.scale - 1).abs() < 5 * math.sqrt(1.36 / 256)).all()
    monkeypatch.setattr(scale_module, "_MAX_VALUES", 3 * 32 * 200)
    get_dip_model(build_with_outliers(), config, calibration=batches)
    assert kept[-1] == 200


# ---- bad input ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_is_named(value):
    model = get_dip_model(build("llama"), DipConfig(weights="frozen", init_noise_std=0.1))
    model.get_base_model().model.embed_tokens.weight.data.fill_(value)
    with pytest.raises(ValueError, match=r"site 'model\.layers\.0' is not finite"):
        model.calibrate([make_batch("llama")])
    assert model.needs_calibration


@pytest.mark.parametrize("noise_scale", ["relative", "absolute"])
def test_an_input_of_another_width_is_named(noise_scale):
    model = build_with_outliers()
    model.model.layers[1].mlp = torch.nn.Sequential(
        torch.nn.Linear(32, 48), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(48, 32))
    )
    config = DipConfig(
        weights="frozen",
        target_modules=r".*mlp\.1$",
        granularity="layer",
        noise_scale=noise_scale,
        init_noise_std=0.1,
    )
    calibration = [make_outlier_batch()] if noise_scale == "relative" else None
    with pytest.raises(
        ValueError, match=r"'model\.layers\.1\.mlp\.1\.0' should have 32 channels along dimension -1.*48\)"
    ):
        get_dip_model(model, config, calibration).train()(**make_outlier_batch())


def test_a_site_whose_channels_are_all_constant_is_named():
    model = build("llama")
    model.model.embed_tokens.weight.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"input of site 'model\.layers\.0', nine in ten tokens have the same value"):
        get_dip_model(model, DipConfig(weights="frozen", init_noise_std=0.1), calibration=[make_batch("llama")])


def test_a_site_that_never_ran_is_named():
    model = build_with_outliers()
    model.model.unused = torch.nn.Linear(32, 32)
    config = DipConfig(weights="frozen", target_modules=["unused", "q_proj"], init_noise_std=0.1)
    with pytest.raises(ValueError, match=r"1 of 4 sites never ran .*: \['model\.unused'\].*target_modules"):
        get_dip_model(model, config, calibration=[make_outlier_batch()])


def test_few_tokens_are_warned_of():
    with pytest.warns(UserWarning, match="calibrated on only 31 tokens.*at least 64 tokens"):
        get_dip_model(build_with_outliers(), DipConfig(weights="frozen"), calibration=[make_outlier_batch(num_rows=2)])
