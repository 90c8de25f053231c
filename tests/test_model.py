"""The adapter as a whole: architectures x kinds of weights x what PEFT promises; calibration, noise and the card."""

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import dipnet_hf
from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.card import read_noise, write_model_card
from dipnet_hf.projection import DipProjection
from tests.tiny_models import NUM_LAYERS, build, make_batch

NAMES = ["llama", "gemma3_text", "gpt2", "qwen3_moe", "vit"]
IA3_TARGETS = {
    "gpt2": {
        "target_modules": ["c_attn", "mlp.c_proj"],
        "feedforward_modules": ["mlp.c_proj"],
        "fan_in_fan_out": True,
    },
    "vit": {"target_modules": ["k_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "qwen3_moe": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
}
WEIGHTS = {
    "lora": lambda name: LoraConfig(r=4, target_modules="all-linear"),
    "lora_and_head": lambda name: LoraConfig(
        r=4,
        target_modules=r".*(c_attn|q_proj)",
        modules_to_save=["classifier" if name == "vit" else "lm_head"],
        bias="lora_only",
    ),
    "dora": lambda name: LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "rslora": lambda name: LoraConfig(r=4, target_modules="all-linear", use_rslora=True),
    "ia3": lambda name: IA3Config(
        **IA3_TARGETS.get(name, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]})
    ),
    "oft": lambda name: OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "full": lambda name: "full",
    "frozen": lambda name: "frozen",
}
# OFT has no layer for the Conv1D of GPT-2, and DoRA none for experts.
NOT_IN_PEFT = [("gpt2", "oft"), ("qwen3_moe", "dora")]
MATRIX = [(name, weights) for name in NAMES for weights in WEIGHTS if (name, weights) not in NOT_IN_PEFT]
matrix = pytest.mark.parametrize(("name", "weights"), MATRIX, ids=map("-".join, MATRIX))

# PEFT's own advice about bias and tied weights, and ours about disabling weights="full".
pytestmark = pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers", "ignore:Disabling an adapter with")


def dip_model(name="llama", weights="lora", **fields):
    """A calibrated model in eval mode."""
    model = build(name)
    batch = make_batch(name)
    torch.manual_seed(0)
    config = DipConfig(weights=WEIGHTS[weights](name), **{"init_noise_std": 0.1, **fields})
    calibration = None if config.noise_scale == "absolute" else [batch]
    return get_dip_model(model, config, calibration=calibration).eval()


def trained(name="llama", weights="lora", **fields):
    """A model whose trainable parameters have moved away from where they start."""
    model = dip_model(name, weights, **fields)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model, batch=None, seed=None):
    """The model's answer as it is, or, with a seed, with noise."""
    batch = make_batch("llama") if batch is None else batch
    noise = contextlib.nullcontext() if seed is None else model.sampling(seed)
    with torch.no_grad(), noise:
        return model(**batch).logits


def assert_same(model, other, name="llama"):
    """Both models give the same answer, with and without noise."""
    batch = make_batch(name)
    assert torch.equal(logits(model, batch), logits(other, batch))
    assert torch.equal(logits(model, batch, seed=3), logits(other, batch, seed=3))


def no_dropout(model):
    """Train mode without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def eps_by_site(model, batch, seed=0):
    """The standard normal noise of one forward, by site: what a projection adds, in units of its std."""
    eps = {}

    def keep(projection, args, output):
        eps[projection.site.name] = (output - args[0]) / (projection.scale * torch.exp(projection.logvar / 2))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, DipProjection)]
    logits(model, batch, seed=seed)
    for hook in hooks:
        hook.remove()
    return eps


# ---- architectures x weights ----


@matrix
def test_starts_as_the_base_model(name, weights):
    batch = make_batch(name)
    expected = logits(build(name), batch)
    model = dip_model(name, weights)
    assert torch.equal(logits(model, batch), expected)
    no_dropout(model)
    noisy = logits(model, batch)
    assert not torch.equal(noisy, expected) and noisy.isfinite().all()
    with model.deterministic():
        assert torch.equal(logits(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), expected)
        with model.sampling(seed=0):
            assert torch.equal(logits(model, batch), expected)
    assert not torch.equal(logits(model, batch), expected)  # on again


@matrix
def test_zero_noise_is_the_base_model(name, weights):
    batch = make_batch(name)
    model = no_dropout(dip_model(name, weights, init_noise_std=0.0))
    assert torch.equal(logits(model, batch), logits(build(name), batch))


@matrix
def test_only_what_should_train_does(name, weights):
    batch = make_batch(name)
    model = trained(name, weights).train()
    expected = {f"{row['name']}.dip_projection.dip_logvar.default" for row in model.noise_summary()}
    if weights == "full":
        expected |= {parameter for parameter, _ in build(name).named_parameters()}
    elif weights != "frozen":
        stock = get_peft_model(build(name), WEIGHTS[weights](name)).get_base_model()
        expected |= {parameter for parameter, tensor in stock.named_parameters() if tensor.requires_grad}
    parameters = dict(model.get_base_model().named_parameters())
    assert {parameter for parameter, tensor in parameters.items() if tensor.requires_grad} == expected
    model(**batch).loss.backward()
    assert {parameter for parameter, tensor in parameters.items() if tensor.grad is not None} == expected
    assert all(parameters[parameter].grad.isfinite().all() for parameter in expected)


@matrix
def test_saves_and_loads_the_same(name, weights, tmp_path):
    model = trained(name, weights)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fields = json.loads(tmp_path.joinpath("adapter_config.json").read_text())
    assert fields["dipnet_hf_version"] == dipnet_hf.__version__ and fields["peft_version"]

    for arguments in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(build(name), str(tmp_path), **arguments)
        assert not loaded.needs_calibration
        assert_same(loaded.eval(), model, name)
        assert loaded.noise_summary() == model.noise_summary()
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        found = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        biases = {name for name in found if "bias" in name}  # PEFT leaves them trainable
        assert found == (trainable if arguments.get("is_trainable") else biases)


@matrix
def test_merging_leaves_the_plain_network(name, weights):
    batch = make_batch(name)
    model = trained(name, weights)
    expected = logits(model, batch)
    merged = model.merge_and_unload()
    plain = build(name)
    assert type(merged) is type(plain) and not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged, batch), expected, atol=1e-5)
    shapes = {key: tensor.shape for key, tensor in plain.state_dict().items()}
    assert {key: tensor.shape for key, tensor in merged.state_dict().items()} == shapes
    assert_no_trace(merged)
    merged.train()
    with torch.no_grad():
        assert torch.equal(no_dropout(merged)(**batch).logits, logits(merged.eval(), batch))


def assert_no_trace(model):
    """Nothing of this package is left: no hook, no sub-module, no attribute."""
    for name, module in model.named_modules():
        assert not isinstance(module, DipProjection)
        assert not module._forward_pre_hooks and not module._forward_hooks, name
        assert not [attribute for attribute in vars(module) if "dip" in attribute or attribute == "peft_config"]


def test_unload_gives_the_base_model_back():
    model = trained()
    unloaded = model.unload()
    assert_no_trace(unloaded)
    assert torch.equal(logits(unloaded), logits(build("llama")))
    again = get_dip_model(
        unloaded, DipConfig(weights="frozen", init_noise_std=0.05), calibration=[make_batch("llama")]
    )
    assert_same(again, dip_model(weights="frozen", init_noise_std=0.05))


@pytest.mark.parametrize("target_sites", ["linear", "embedding"])
def test_sites_inside_adapters_round_trip(tmp_path, target_sites):
    model = trained(target_sites=target_sites)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(build("llama"), str(tmp_path)), model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert_no_trace(merged)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


EXPORTED = ["lora", "lora_and_head", "dora", "rslora", "ia3", "oft"]
LOAD_EXPORTS = """
import sys, torch
from pathlib import Path
from peft import AutoPeftModelForCausalLM
root = Path(sys.argv[1])
batch = torch.load(root / "batch.pt")
for name in sys.argv[2:]:
    model = AutoPeftModelForCausalLM.from_pretrained(root / name)
    with torch.no_grad():
        torch.save(model(**batch).logits, root / name / "logits.pt")
assert "dipnet_hf" not in sys.modules
"""


def test_exported_weights_load_without_this_package(tmp_path):
    batch = make_batch("llama")
    torch.save(batch, tmp_path / "batch.pt")
    build("llama").save_pretrained(tmp_path / "base")
    expected = {}
    for weights in EXPORTED:
        model = trained("llama", weights)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.export_weights_adapter(tmp_path / weights)
        assert json.loads(tmp_path.joinpath(weights, "adapter_config.json").read_text())["inference_mode"]
        expected[weights] = logits(model)
        assert_same(model, trained("llama", weights))  # exporting has changed nothing
    command = [sys.executable, "-c", LOAD_EXPORTS, str(tmp_path), *EXPORTED]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for weights in EXPORTED:
        assert torch.equal(torch.load(tmp_path / weights / "logits.pt"), expected[weights]), weights


@pytest.mark.parametrize("weights", ["full", "frozen"])
def test_there_is_nothing_to_export(tmp_path, weights):
    with pytest.raises(ValueError, match=f"weights='{weights}' has no PEFT adapter to export.*merge_and_unload"):
        dip_model(weights=weights).export_weights_adapter(tmp_path)


# ---- several adapters ----


@pytest.fixture
def two_adapters(tmp_path):
    """A folder with an adapter of LoRA, a head and noise at two layers, and one of noise alone; and the two models."""
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    models = {
        "first": trained(weights="lora_and_head", layers_to_transform=[1, 2]),
        "second": trained(weights="frozen"),
    }
    for name, model in models.items():
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / name)
    return tmp_path, models


def test_auto_class_loads_it(two_adapters):
    folder, models = two_adapters
    for name, model in models.items():
        assert_same(AutoPeftModelForCausalLM.from_pretrained(str(folder / name)), model)


def test_adapters_side_by_side(two_adapters):
    folder, models = two_adapters
    model = PeftModel.from_pretrained(build("llama"), str(folder / "first"), adapter_name="first")
    model.load_adapter(str(folder / "second"), "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert [row["name"] for row in model.noise_summary()] == [row["name"] for row in models[name].noise_summary()]
        assert_same(model, models[name])
    with pytest.raises(ValueError, match=r"One DIP adapter can be active at a time, got \['first', 'second'\]"):
        model.base_model.set_adapter(["first", "second"])

    model.save_pretrained(folder / "both")
    for name in models:
        alone = PeftModel.from_pretrained(build("llama"), str(folder / "both" / name))
        assert_same(alone, models[name])

    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    assert not [key for key in model.state_dict() if "first" in key]
    assert_same(model, models["second"])
    with pytest.raises(ValueError, match="Adapter first does not exist"):
        model.delete_adapter("first")


def test_an_adapter_added_beside_another_starts_as_the_base_model():
    model = trained()
    expected = logits(model), logits(model, seed=3)
    model.add_adapter(
        "fresh", DipConfig(weights=IA3Config(), task_type="CAUSAL_LM", target_sites="attention", init_noise_std=0.1)
    )
    assert torch.equal(logits(model), expected[0]) and torch.equal(logits(model, seed=3), expected[1])
    model.set_adapter("fresh")
    assert torch.equal(logits(model), logits(build("llama")))
    assert model.needs_calibration
    model.calibrate([make_batch("llama")])
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("fresh" in key for key in trainable)
    model.delete_adapter("fresh")
    assert torch.equal(logits(model), expected[0]) and torch.equal(logits(model, seed=3), expected[1])


def test_deleting_the_only_adapter_leaves_no_noise():
    model = trained(weights="frozen")
    base = model.get_base_model()
    model.delete_adapter("default")  # PEFT's own forward then misses its adapter
    assert torch.equal(logits(base.train()), logits(build("llama")))


@pytest.mark.parametrize(("held", "added"), [("frozen", "full"), ("full", "frozen"), ("lora", "full")])
def test_full_weights_allow_no_other_adapter(held, added):
    model = dip_model(weights=held)
    keys = list(model.state_dict())
    config = DipConfig(weights=WEIGHTS[added]("llama"), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match='weights="full"'):
        model.add_adapter("second", config)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]


def test_disabling_full_weights_warns():
    model = dip_model(weights="full")
    with pytest.warns(UserWarning, match='weights="full" removes its noise only'), model.disable_adapter():
        pass


def test_status_and_counts(capsys):
    model = dip_model()
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert sum("dip_projection" in name for name in layers) == NUM_LAYERS
    assert all(layer.requires_grad == {"default": True} for layer in layers.values())
    model.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,}" in capsys.readouterr().out


# ---- mistakes ----


def test_models_and_configs_of_another_kind():
    with pytest.raises(TypeError, match=r"holds a PEFT adapter.*DipConfig\(weights=...\).*merge_and_unload"):
        get_dip_model(get_peft_model(build("llama"), LoraConfig()), DipConfig(weights="frozen"))
    with pytest.raises(TypeError, match="holds a PEFT adapter"):
        get_dip_model(dip_model(), DipConfig(weights="frozen"))
    with pytest.raises(TypeError, match=r"config must be a DipConfig, got LoraConfig"):
        get_dip_model(build("llama"), LoraConfig())


@pytest.mark.parametrize("fields", [{"layers_to_transform": 9}, {"weights": LoraConfig(target_modules=["q_prj"])}])
def test_a_refused_config_changes_nothing(fields):
    model = build("llama")
    with pytest.raises(ValueError, match="q_prj|layers_to_transform"):
        get_dip_model(model, DipConfig(**fields))
    assert_no_trace(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("weights", ["lora", "full", "frozen"])
@pytest.mark.parametrize("shape", [{"num_layers": 2}, {"num_layers": 4}, {"hidden_size": 16}], ids=str)
def test_an_adapter_of_another_shape_is_refused(tmp_path, weights, shape):
    trained(weights=weights).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on a model of another shape: '.*dip_projection.*' has shape"):
        PeftModel.from_pretrained(build("llama", **shape), str(tmp_path))


@pytest.mark.parametrize(
    "weights", [AdaLoraConfig(total_step=10, target_modules=["q_proj"]), VeraConfig()], ids=["adalora", "vera"]
)
def test_weights_that_need_a_tuner_of_their_own_are_refused(weights):
    with pytest.raises(ValueError, match="keeps state on a tuner of its own"):
        get_dip_model(build("llama"), DipConfig(weights=weights))


@pytest.mark.parametrize(
    "weights",
    [LoraConfig(modules_to_save=["embed_tokens"]), LoraConfig(trainable_token_indices=[4])],
    ids=["saved", "tokens"],
)
def test_sites_in_modules_that_are_saved_whole_are_refused(weights):
    model = build("llama")
    with pytest.raises(ValueError, match=r"sites \['model.embed_tokens'\] lie in modules"):
        get_dip_model(model, DipConfig(weights=weights, target_sites="embedding"))
    assert_no_trace(model)


def test_a_failed_merge_keeps_the_noise(tiny_llama, batch):
    model = get_dip_model(
        tiny_llama, DipConfig(weights=LoraConfig(init_lora_weights=False), init_noise_std=0.1), calibration=[batch]
    ).train()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert len(model.noise_summary()) == 3
    projection = model.get_base_model().model.layers[0].dip_projection
    inputs = torch.ones(1, 2, 32)
    model.base_model._begin_forward(None, (), {})
    assert not torch.equal(projection(inputs), inputs)


def test_sites_of_an_asymmetric_encoder_decoder_are_in_the_decoder():
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2)
    model = get_dip_model(T5ForConditionalGeneration(config), DipConfig(weights="frozen"))
    assert [row["name"] for row in model.noise_summary()] == [f"decoder.block.{i}" for i in range(3)]


def test_calibration_leaves_every_module_in_its_mode(tiny_llama, batch):
    model = get_dip_model(tiny_llama, DipConfig(weights="frozen", init_noise_std=0.1)).train()
    frozen = model.get_base_model().model.layers[1].eval()
    model.calibrate([batch])
    assert model.training and not frozen.training


def test_the_config_given_is_not_changed():
    config = DipConfig(weights=LoraConfig(target_modules="all-linear"))
    before = copy.deepcopy(config)
    get_dip_model(build("llama"), config)
    assert config == before


# ---- noise ----


def correlation(a, b):
    """The mean product of two standard normal tensors, in standard errors."""
    return ((a * b).mean() * a.numel() ** 0.5).abs()


def test_noise_is_fresh_everywhere():
    batch = {name: tensor[:1].repeat(8, 1) for name, tensor in make_batch("llama").items()}  # eight rows alike
    model = dip_model()
    eps = eps_by_site(model, batch)
    assert len(eps) == NUM_LAYERS
    first, second, third = eps.values()
    assert max(correlation(first, second), correlation(second, third), correlation(first, third)) < 5
    for eps_BLD in eps.values():
        assert abs(eps_BLD.std().item() - 1) < 5 * (2 * eps_BLD.numel()) ** -0.5
        assert correlation(eps_BLD[1:], eps_BLD[:-1]) < 5  # rows
        assert correlation(eps_BLD[:, 1:], eps_BLD[:, :-1]) < 5  # tokens
        assert correlation(eps_BLD[..., 1:], eps_BLD[..., :-1]) < 5  # channels
    with model.sampling(seed=0):
        again = [eps_by_site(model, batch, seed=None) for _ in range(2)]
    assert correlation(again[0]["model.layers.0"], again[1]["model.layers.0"]) < 5  # successive forwards


def test_sampling_with_a_seed_repeats():
    model = dip_model()
    with model.sampling(seed=0):
        first = [logits(model) for _ in range(3)]
    torch.manual_seed(5)
    with model.train().sampling(seed=0):
        again = [logits(model) for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(first[0], logits(model.eval(), seed=1))
    assert torch.equal(logits(model), logits(build("llama")))  # the context is over


def test_sampling_without_a_seed_follows_the_global_generator():
    model = dip_model()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        with model.sampling():
            drawn.append((logits(model), logits(model)))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(*drawn[0])


def test_contexts_nest_and_end_with_an_error():
    model = dip_model()
    plain = logits(model)
    with model.sampling(seed=0):
        noisy = logits(model)
        with model.deterministic():
            assert torch.equal(logits(model), plain)
        assert not torch.equal(logits(model), plain)
    with pytest.raises(KeyError, match="stop"), model.sampling(seed=0):
        assert torch.equal(logits(model), noisy)
        raise KeyError("stop")
    assert torch.equal(logits(model), plain)
    model.train()  # its draws follow the global generator again
    torch.manual_seed(5)
    noisy = logits(model)
    torch.manual_seed(5)
    assert torch.equal(logits(model), noisy)


def test_generation(batch):
    prompt = {"input_ids": batch["input_ids"][:, :4], "attention_mask": batch["attention_mask"][:, :4]}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = dip_model(init_noise_std=1.0)
    plain = build("llama").generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), plain)
    drawn = []
    for seed in (0, 0, 1):
        with model.sampling(seed):
            drawn.append(model.generate(**prompt, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], plain) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.generate(**prompt, **options), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_leaves_the_noise_in_float32(dtype, tmp_path):
    model = trained()
    noise = {key: tensor.clone() for key, tensor in model.state_dict().items() if "dip_" in key}
    assert len(noise) == 3 * NUM_LAYERS and all(tensor.dtype == torch.float32 for tensor in noise.values())
    summary = model.noise_summary()
    model.to(dtype)
    assert model.noise_summary() == summary
    state = model.state_dict()
    assert all(state[key].dtype == torch.float32 and torch.equal(state[key], noise[key]) for key in noise)
    output = logits(model, seed=0)
    assert output.dtype == dtype and output.isfinite().all()
    assert not torch.equal(output, logits(model))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").to(dtype), str(tmp_path))
    assert loaded.noise_summary() == summary
    assert all(torch.equal(loaded.state_dict()[key], noise[key]) for key in noise)


def test_a_deep_copy_is_independent():
    model = trained()
    expected = logits(model), logits(model, seed=3)
    twin = copy.deepcopy(model)
    assert_same(twin, model)
    with twin.sampling(seed=3):
        assert torch.equal(logits(model), expected[0])
    for parameter in twin.parameters():
        parameter.data += 1.0
    twin.set_adapter("default")
    assert torch.equal(logits(model), expected[0]) and torch.equal(logits(model, seed=3), expected[1])
    assert not torch.equal(logits(twin), expected[0])
    model.delete_adapter("default")
    assert not torch.equal(logits(twin, seed=3), logits(twin))


# ---- the card ----


def test_the_card_says_what_the_adapter_is(tmp_path):
    model = trained(num_samples=2, layers_to_transform=[0, 2], target_sites="mlp")
    model.peft_config["default"].base_model_name_or_path = "someone/a-model"
    model.save_pretrained(tmp_path)
    card = tmp_path.joinpath("README.md")
    text = card.read_text()
    header, body = text.split("---\n")[1:3]
    assert "base_model: someone/a-model" in header and "library_name: peft" in header
    assert "- dipnet\n" in header and "- dipnet_hf\n" in header
    assert "import dipnet_hf" in body and "from peft import AutoPeftModelForCausalLM" in body
    for expected in (
        "`someone/a-model`",
        "`LORA`",
        "Sites: `mlp`, layers `[0, 2]`",
        "2 noise sample(s)",
        "not recorded",
    ):
        assert expected in body
    assert f"dipnet_hf {dipnet_hf.__version__}" in body and "More Information Needed" not in body
    noise = read_noise(tmp_path)
    assert list(noise) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    for row in model.noise_summary():
        std = noise[row["name"]]["std"]
        assert sum(std) / len(std) == pytest.approx(row["mean"], rel=1e-5)
        assert statistics.median_low(noise[row["name"]]["scale"]) == row["scale"]
        cells = "".join(f" {row[name]:.4g} |" for name in ("scale", "mean", "min", "max"))
        assert f"| {row['name']} |{cells}\n" in body


def test_the_card_keeps_what_was_written_by_hand(tmp_path):
    model = trained()
    card = tmp_path.joinpath("README.md")
    card.write_text("Above, by hand. [More Information Needed]\n")
    model.save_pretrained(tmp_path)
    card.write_text(f"{card.read_text()}\nBelow, by hand.\n")
    model.save_pretrained(tmp_path)
    saved = card.read_text()
    write_model_card(tmp_path, training_data="some problems", metrics={"eval_nll": 1.23456})
    measured = card.read_text()
    assert "- Training data: some problems\n- eval_nll: 1.2346\n" in measured
    for text in (saved, measured):
        assert text.count("# DIPNet adapter") == text.count("## Learned noise") == text.count("import dipnet_hf") == 1
        assert text.index("Above, by hand.") < text.index("# DIPNet adapter") < text.index("Below, by hand.")
    model.save_pretrained(tmp_path)
    assert card.read_text() == saved  # saving again adds nothing


def test_layers_of_a_deep_model_are_in_their_order(tmp_path):
    model = get_dip_model(
        build("llama", num_layers=12), DipConfig(weights="frozen", noise_scale="absolute", init_noise_std=0.05)
    )
    model.save_pretrained(tmp_path)
    assert list(read_noise(tmp_path)) == [f"model.layers.{i}" for i in range(12)]
