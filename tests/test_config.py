"""DipConfig: every mistake is named, and the file that is written reads back the same."""

import dataclasses
import json
import re
import warnings

import pytest
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)

import dipnet_hf
from dipnet_hf import DipConfig, kl_weights

WEIGHTS = {
    "frozen": "frozen",
    "full": "full",
    "lora": LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1, 2], rank_pattern={"q_proj": 2}
    ),
    "dora": LoraConfig(target_modules="all-linear", use_dora=True),
    "rslora": LoraConfig(target_modules=r".*\.q_proj", use_rslora=True, modules_to_save=["lm_head"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    "lokr": LoKrConfig(target_modules=["q_proj"]),
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "ful"}, r"\['full', 'frozen'\] or a PEFT config.*got 'ful'.*mean 'full'"),
        ({"weights": {"peft_type": "LORRA"}}, "peft_type of the weights must be .*mean 'LORA'"),
        ({"weights": {"r": 4}}, "peft_type of the weights must be one of .*got None"),
        ({"weights": PromptTuningConfig(num_virtual_tokens=2)}, "injected into layers.*got PromptTuningConfig"),
        ({"weights": PrefixTuningConfig(num_virtual_tokens=2)}, "injected into layers.*got PrefixTuningConfig"),
        (
            {"weights": AdaptionPromptConfig(adapter_len=2, adapter_layers=2)},
            "injected into layers.*got AdaptionPrompt",
        ),
        (
            {"weights": LoraConfig(task_type="SEQ_CLS"), "task_type": "TOKEN_CLS"},
            "task_type='TOKEN_CLS' contradicts task_type='SEQ_CLS' of the weights: give it once",
        ),
        ({"weights": DipConfig(weights="frozen")}, "injected into layers.*got DipConfig"),
        ({"target_sites": "decoder_layers"}, "target_sites must be one of .*Did you mean 'decoder_layer'"),
        ({"target_sites": "mlp", "target_modules": ["up_proj"]}, r"got both: 'mlp' and \['up_proj'\]"),
        ({"target_sites": "embedding", "layers_to_transform": 0}, 'no meaning with target_sites="embedding"'),
        ({"target_modules": r".*\.mlp", "layers_to_transform": 0}, "needs target_modules as a list"),
        ({"layers_pattern": "layers"}, "layers_pattern needs target_modules and layers_to_transform"),
        ({"target_modules": ["mlp"], "layers_pattern": "h"}, "needs target_modules and layers_to_transform"),
        ({"granularity": "token"}, r"granularity must be one of \['channel', 'layer'\], got 'token'"),
        ({"noise_scale": "relativ"}, "noise_scale must be one of .*Did you mean 'relative'"),
        ({"init_noise_std": -0.1}, "init_noise_std must be a finite number of at least 0, got -0.1"),
        ({"init_noise_std": float("nan")}, "init_noise_std must be a finite number.*got nan"),
        ({"init_noise_std": float("inf")}, "init_noise_std must be a finite number.*got inf"),
        ({"init_noise_std": "0.1"}, r"init_noise_std must be one of \['auto'\] or a number, got '0.1'"),
        ({"init_noise_std": "automatic"}, "init_noise_std must be .*got 'automatic'.*Did you mean 'auto'"),
        ({"init_loss_increase": -0.1}, "init_loss_increase must be a finite number of at least 0, got -0.1"),
        ({"init_loss_increase": 0}, "init_loss_increase must be positive"),
        ({"logvar_learning_rate": -1.0}, "logvar_learning_rate must be a finite number of at least 0"),
        ({"prior_reduction": "none"}, r"prior_reduction must be one of \['mean', 'sum'\], got 'none'"),
        ({"alpha": 1.0}, "both alpha and beta or neither, got alpha=1.0 and beta=None"),
        ({"beta": 1.0}, "both alpha and beta or neither, got alpha=None and beta=1.0"),
        ({"alpha": -1.0, "beta": 1.0}, "alpha must be a finite number of at least 0, got -1.0"),
        ({"alpha": 1.0, "beta": -1.0}, "beta must be a finite number of at least 0, got -1.0"),
        ({"alpha": 1.0, "beta": 0.0}, "beta=0 makes the variances collapse.*Give a positive beta"),
        ({"alpha": 1.0, "beta": 1.0, "prior_std": 0.1}, "alpha and beta, or prior_std and prior_weight, not both"),
        ({"alpha": 1.0, "beta": 1.0, "prior_weight": 2.0}, "alpha and beta, or prior_std and prior_weight, not both"),
        ({"prior_std": 0.0}, "prior_std must be a positive number, or None, got 0.0"),
        ({"prior_std": float("nan")}, "prior_std must be a positive number, or None, got nan"),
        ({"prior_std": "0.1"}, "prior_std must be a positive number, or None, got '0.1'"),
        ({"prior_weight": -1.0}, "prior_weight must be a finite number of at least 0, got -1.0"),
        ({"init_noise_std": 0.0, "alpha": 1.0, "beta": 1.0}, "init_noise_std=0 makes the prior infinite"),
        ({"stability_target": "prob"}, r"stability_target must be one of \['log_prob', 'logits'\]"),
        ({"stability_loss_weight": -1}, "stability_loss_weight must be a finite number of at least 0"),
        ({"stability_loss_weight": 0.1}, "stability_loss_weight=0.1 needs num_samples >= 2"),
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, got 0"),
        ({"num_samples": 2.0}, "num_samples must be an integer of at least 1, got 2.0"),
        ({"num_samples": True}, "num_samples must be an integer of at least 1, got True"),
        ({"sampling": "pairs", "antithetic": True}, "sampling or antithetic, not both"),
        ({"num_samples": 3, "sampling": "pairs"}, 'needs an even num_samples, got 3.*sampling="independent"'),
        (
            {"sampling": "pair"},
            r"sampling must be one of \['pairs', 'independent'\], got 'pair'. Did you mean 'pairs'",
        ),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        DipConfig(**fields)


@pytest.mark.parametrize("weights", [None, 3, LoraConfig])
def test_weights_of_another_type(weights):
    with pytest.raises(TypeError, match='weights must be a PEFT config, "full" or "frozen", got'):
        DipConfig(weights=weights)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_modules": {"mlp", "self_attn"}},
        {"target_modules": ["mlp"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_sites": "linear", "granularity": "layer", "noise_scale": "absolute", "layers_to_transform": 1},
        {"num_samples": 4, "alpha": 0.0, "beta": 0.0, "stability_loss_weight": 0.1, "stability_target": "logits"},
        {"init_noise_std": 0.0, "num_samples": 3, "sampling": "independent"},
        {"init_noise_std": 0.1, "alpha": 0.0, "beta": 0.3},  # a prior that only pushes up: an infinite prior_std
    ],
    ids=lambda fields: "-".join(fields) or "defaults",
)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_file_reads_back_the_same(tmp_path, weights, fields):
    config = DipConfig(weights=WEIGHTS[weights], task_type="CAUSAL_LM", **fields)
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(config.to_dict()))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is DipConfig
    assert loaded == config
    assert json.dumps(loaded.to_dict()) == json.dumps(config.to_dict())


def test_the_file_states_its_versions():
    fields = DipConfig(weights=LoraConfig()).to_dict()
    assert fields["peft_type"] == "DIP"
    assert fields["dipnet_hf_version"] == dipnet_hf.__version__
    assert fields["peft_version"] and fields["weights"]["peft_type"] == "LORA"
    assert (
        DipConfig(weights="frozen", dipnet_hf_version="0.0.1").dipnet_hf_version == "0.0.1"
    )  # what a file says stays


@pytest.mark.parametrize("inside", [False, True], ids=["own field", "field of the weights"])
def test_unknown_fields_of_a_newer_version_only_warn(tmp_path, inside):
    config = DipConfig(weights=LoraConfig(r=4, target_modules=["q_proj"]), init_noise_std=0.2)
    fields = config.to_dict()
    (fields["weights"] if inside else fields)["of_tomorrow"] = 1
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="of_tomorrow"):
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert loaded == config


def test_the_papers_weights_are_kept_as_a_prior():
    config = DipConfig(weights="frozen", alpha=2.0, beta=0.5)
    assert (config.prior_std, config.prior_weight) == (0.5, 1.0)
    assert kl_weights(config.prior_std, config.prior_weight) == (2.0, 0.5)
    assert (
        DipConfig(weights="frozen", alpha=0.0, beta=0.0).prior_std,
        DipConfig(weights="frozen", alpha=0.0, beta=0.0).prior_weight,
    ) == (None, 0.0)
    rising = DipConfig(weights="frozen", alpha=0.0, beta=0.5)
    assert kl_weights(rising.prior_std, rising.prior_weight) == (0.0, 0.5)


def test_a_file_of_version_0_1_means_what_it_meant(tmp_path):
    fields = DipConfig(weights="frozen", init_noise_std=0.05).to_dict()
    for name in ("init_loss_increase", "prior_std", "prior_weight"):
        del fields[name]
    del fields["sampling"]
    fields |= {"alpha": 200.0, "beta": 0.5, "num_samples": 4, "antithetic": False, "shared_prompt_noise": False}
    fields |= {"dipnet_hf_version": "0.1.0"}
    tmp_path.joinpath("adapter_config.json").write_text(json.dumps(fields))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert (loaded.init_noise_std, loaded.prior_std, loaded.prior_weight) == (0.05, 0.05, 1.0)
    assert (loaded.num_samples, loaded.sampling) == (4, "independent")


@pytest.mark.parametrize(("num_samples", "sampling"), [(2, "pairs"), (3, "independent"), (4, "pairs")])
def test_samples_come_in_pairs_where_they_can(num_samples, sampling):
    config = DipConfig(weights="frozen")
    config.num_samples = num_samples
    for given in (config, DipConfig(num_samples=num_samples)):
        assert given.uses_pairs == (sampling == "pairs")


def test_the_default_trains_lora_on_all_linears():
    weights = DipConfig().weights
    assert isinstance(weights, LoraConfig) and (weights.r, weights.target_modules) == (16, "all-linear")
    assert DipConfig().weights is not weights


@pytest.mark.parametrize(("prior_std", "weight"), [(0, 1), (-1, 1), (float("nan"), 1), (1, -1), (1, float("nan"))])
def test_kl_weights_refuses_what_is_no_prior(prior_std, weight):
    with pytest.raises(ValueError, match="prior_std must be positive|weight must not be negative"):
        kl_weights(prior_std, weight)


def test_every_field_is_explained():
    explained = re.findall(r"^ {8}(\w+) \(", DipConfig.__doc__, flags=re.MULTILINE)
    inherited = {field.name for field in dataclasses.fields(PeftConfig)}
    assert explained == [field.name for field in dataclasses.fields(DipConfig) if field.name not in inherited]
