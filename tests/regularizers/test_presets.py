"""Configs of fixed noise: their variances stay, and their noise is where and as large as the papers have it."""

import re

import pytest
import torch
import yaml
from peft import LoraConfig

from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.regularizers.presets import hype_config, layer_noise_config, randomized_smoothing_config
from tests.helpers import make_rows, make_trainer, record
from tests.tiny_models import NUM_LAYERS, build, make_batch

PRESETS = [hype_config, layer_noise_config, randomized_smoothing_config]


def noisy(preset, **config):
    torch.manual_seed(0)
    model = get_dip_model(build("llama"), preset(**{"weights": "full"} | config))
    if model.base_model.needs_calibration:
        model.calibrate([make_batch("llama", 16)])
    return model


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("preset", PRESETS)
def test_variances_stay_to_the_bit_while_weights_learn(tmp_path, preset, optim):
    """With weight decay and the largest learning rate."""
    model = noisy(preset)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = dict(learning_rate=0.1, weight_decay=0.3, optim=optim)
    make_trainer(model, make_rows(), tmp_path, **arguments).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("dip_" in name), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_yaml_of_the_docstring_is_the_preset(preset):
    (block,) = re.findall(r"dip: \{[^}]*\}", preset.__doc__)
    assert DipConfig(**yaml.safe_load(block)["dip"]).to_dict() == preset().to_dict()


def test_other_fields_are_those_of_the_config():
    weights = LoraConfig(r=2, target_modules="all-linear")
    config = layer_noise_config(0.3, weights=weights, num_samples=2)
    assert (config.init_noise_std, config.weights, config.num_samples) == (0.3, weights, 2)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'target_sites'"):
        randomized_smoothing_config(target_sites="mlp")


def added_noise(model, names):
    """What a pass in training adds to the inputs of modules, given equal inputs below: only for the first of them."""
    seen, batch = record(model.get_base_model(), names), make_batch("llama", 64)
    for mode in (False, True):
        model.train(mode)(**batch)
    return [noisy - plain for plain, noisy in seen.values()]


def assert_normal(noise, std):
    """Of mean 0, this standard deviation in every channel, and the fourth moment of a normal distribution."""
    z = noise.double() / std
    n = z.numel()
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert abs(z.pow(4).mean() - 3) < 5 * (96 / n) ** 0.5
    per_channel = z.flatten(0, 1).square().mean(0)
    assert (per_channel - 1).abs().max() < 5 * (2 / (n / len(per_channel))) ** 0.5


def test_hype_adds_normal_noise_of_one_size_at_every_layer():
    model = noisy(hype_config)
    first, *others = added_noise(model, [f"model.layers.{i}" for i in range(NUM_LAYERS)])
    assert_normal(first, 1e-5)
    assert all(0.5e-5 < noise.std() < 1e-3 for noise in others)
    assert len(model.noise_summary()) == NUM_LAYERS


def test_randomized_smoothing_adds_noise_of_one_size_to_the_embedding_alone():
    model = noisy(randomized_smoothing_config, noise_std=0.01)
    (noise,) = added_noise(model, ["model.layers.0"])
    assert_normal(noise, 0.01)
    assert [row["name"] for row in model.noise_summary()] == ["model.embed_tokens"]


def test_levels_are_found_by_calibration():
    for preset in (layer_noise_config, randomized_smoothing_config):
        assert 0 < noisy(preset).init_noise_std < 10
