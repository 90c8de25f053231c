"""The adapter as a whole: architectures x kinds of weights x what PEFT promises; several adapters; mistakes."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import dipnet_hf
from dipnet_hf import DipConfig, dip_loss, get_dip_model
from tests.helpers import (
    WEIGHTS,
    assert_no_trace,
    assert_same,
    calibrated_model,
    dip_model,
    logits,
    record,
    save_two_adapters,
    trained_model,
)
from tests.tiny_models import (
    NUM_LAYERS,
    build,
    build_task,
    build_with_outliers,
    make_batch,
    make_outlier_batch,
    make_task_batch,
)

NAMES = ["llama", "gemma3_text", "gpt2", "qwen3_moe", "vit"]
# OFT has no layer for the Conv1D of GPT-2, and DoRA none for experts.
NOT_IN_PEFT = [("gpt2", "oft"), ("qwen3_moe", "dora")]
MATRIX = [(name, weights) for name in NAMES for weights in WEIGHTS if (name, weights) not in NOT_IN_PEFT]
matrix = pytest.mark.parametrize(("name", "weights"), MATRIX, ids=map("-".join, MATRIX))

# PEFT's own advice about bias and tied weights, and ours about disabling weights="full".
pytestmark = pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers", "ignore:Disabling an adapter with")


def no_dropout(model):
    """Train mode without dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# ---- architectures x weights ----


@matrix
def test_starts_as_the_base_model(name, weights):
    batch = make_batch(name)
    expected = logits(build(name), batch)
    model = calibrated_model(name, weights)
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
    model = no_dropout(calibrated_model(name, weights, init_noise_std=0.0))
    assert torch.equal(logits(model, batch), logits(build(name), batch))


@matrix
def test_only_what_should_train_does(name, weights):
    batch = make_batch(name)
    model = trained_model(name, weights).train()
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
    model = trained_model(name, weights)
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
    model = trained_model(name, weights)
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


def test_unload_gives_the_base_model_back():
    model = trained_model()
    unloaded = model.unload()
    assert_no_trace(unloaded)
    assert torch.equal(logits(unloaded), logits(build("llama")))
    again = get_dip_model(
        unloaded, DipConfig(weights="frozen", init_noise_std=0.05), calibration=[make_batch("llama")]
    )
    assert_same(again, calibrated_model(weights="frozen", init_noise_std=0.05))


def test_a_finished_adapter_gets_noise_without_training(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # as a trained one: B is not zero
    finished, batch = get_peft_model(build_with_outliers(), lora).eval(), make_outlier_batch()
    expected = logits(finished, batch)
    finished.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    model = get_dip_model(merged, DipConfig(weights="frozen"), calibration=[batch])
    assert torch.allclose(logits(model, batch), expected, atol=1e-4)
    with model.ensemble(num_samples=4):
        assert not torch.allclose(logits(model, batch), expected, atol=1e-2)
    model.save_pretrained(tmp_path / "noise")
    assert_same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "noise"), model)


@pytest.mark.parametrize("target_sites", ["linear", "embedding"])
def test_sites_inside_adapters_round_trip(tmp_path, target_sites):
    model = trained_model(target_sites=target_sites)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(build("llama"), str(tmp_path)), model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert_no_trace(merged)
    assert torch.allclose(logits(merged), expected, atol=1e-5)


# ---- several adapters ----


def test_adapters_side_by_side(tmp_path):
    models = save_two_adapters(tmp_path)
    model = PeftModel.from_pretrained(build("llama"), str(tmp_path / "first"), adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert [row["name"] for row in model.noise_summary()] == [row["name"] for row in models[name].noise_summary()]
        assert_same(model, models[name])
    with pytest.raises(ValueError, match=r"One DIP adapter can be active at a time, got \['first', 'second'\]"):
        model.base_model.set_adapter(["first", "second"])

    model.save_pretrained(tmp_path / "both")
    for name in models:
        alone = PeftModel.from_pretrained(build("llama"), str(tmp_path / "both" / name))
        assert_same(alone, models[name])

    model.delete_adapter("first")
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    assert not [key for key in model.state_dict() if "first" in key]
    assert_same(model, models["second"])
    with pytest.raises(ValueError, match="Adapter first does not exist"):
        model.delete_adapter("first")


def test_transformers_own_loading_of_adapters_is_refused_by_name(tmp_path):
    """It would put freshly initialised weights into the model."""
    build("llama").save_pretrained(tmp_path / "base")
    model = trained_model()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    message = r"its weights would not be loaded. Load it with peft's AutoPeftModelForCausalLM"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    base = build("llama")
    for put in (lambda: base.load_adapter(str(tmp_path / "adapter")), lambda: base.add_adapter(DipConfig())):
        with pytest.raises(ValueError, match=message):
            put()
    assert_no_trace(base)


def test_an_adapter_added_beside_another_starts_as_the_base_model():
    model = trained_model()
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
    model = trained_model(weights="frozen")
    base = model.get_base_model()
    model.delete_adapter("default")  # PEFT's own forward then misses its adapter
    assert torch.equal(logits(base.train()), logits(build("llama")))


def test_disabling_full_weights_warns():
    model = calibrated_model(weights="full")
    with pytest.warns(UserWarning, match='weights="full" removes its noise only'), model.disable_adapter():
        pass


def test_status_and_counts(capsys):
    model = calibrated_model()
    status = model.get_model_status()
    assert status.enabled and status.active_adapters == ["default"] and not status.merged_adapters
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert sum("dip_projection" in name for name in layers) == NUM_LAYERS
    assert all(layer.requires_grad == {"default": True} for layer in layers.values())
    model.print_trainable_parameters()
    assert f"trainable params: {status.trainable_params:,}" in capsys.readouterr().out


def test_a_deep_copy_is_independent():
    model = trained_model()
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


# ---- mistakes ----


def test_models_and_configs_of_another_kind():
    with pytest.raises(TypeError, match=r"holds a PEFT adapter.*DipConfig\(weights=...\).*merge_and_unload"):
        get_dip_model(get_peft_model(build("llama"), LoraConfig()), DipConfig(weights="frozen"))
    with pytest.raises(TypeError, match="holds a PEFT adapter"):
        get_dip_model(calibrated_model(), DipConfig(weights="frozen"))
    with pytest.raises(TypeError, match=r"config must be a DipConfig, got LoraConfig"):
        get_dip_model(build("llama"), LoraConfig())


@pytest.mark.parametrize("fields", [{"layers_to_transform": 9}, {"weights": LoraConfig(target_modules=["q_prj"])}])
def test_a_refused_config_changes_nothing(fields):
    model = build("llama")
    with pytest.raises(ValueError, match="q_prj|layers_to_transform"):
        get_dip_model(model, DipConfig(**fields))
    assert_no_trace(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_sound_takes_its_own_inputs():
    """PEFT's classes of tasks pass `input_ids`, so no task is guessed for it, and one that is said is refused."""
    batch = make_task_batch("whisper")
    expected = logits(build_task("whisper"), batch)
    weights = LoraConfig(target_modules=["q_proj"])
    model = get_dip_model(build_task("whisper"), DipConfig(weights=weights, init_noise_std=0.1), calibration=[batch])
    assert torch.equal(logits(model.eval(), batch), expected)
    assert model.generate(input_features=batch["input_features"], max_new_tokens=2).shape[0] == 4
    with pytest.raises(ValueError, match="task_type='SEQ_2_SEQ_LM' makes PEFT pass input_ids.*takes none. Leave"):
        get_dip_model(build_task("whisper"), DipConfig(weights=weights, task_type="SEQ_2_SEQ_LM"))


def test_a_failed_merge_keeps_the_noise(tiny_llama, batch):
    model = get_dip_model(
        tiny_llama, DipConfig(weights=LoraConfig(init_lora_weights=False), init_noise_std=0.1), calibration=[batch]
    ).train()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert len(model.noise_summary()) == 3
    seen = record(model.get_base_model(), ["model.layers.0"])["model.layers.0"]  # what enters it is no NaN yet
    with torch.no_grad():
        model(**batch)
        with model.deterministic():
            model(**batch)
    noisy, plain = seen
    assert noisy.isfinite().all() and not torch.equal(noisy, plain)


def test_the_config_given_is_not_changed():
    config = DipConfig(weights=LoraConfig(target_modules="all-linear"))
    before = copy.deepcopy(config)
    get_dip_model(build("llama"), config)
    assert config == before


def test_training_whose_noise_never_runs_is_refused():
    base = build("llama")
    model = dip_model(base, noise_scale="absolute").train()
    embedding, head = base.model.embed_tokens, base.lm_head
    base.forward = lambda input_ids, **_: head(embedding(input_ids))  # as of kernels that know nothing of the hooks
    for _ in range(7):
        model(input_ids=make_batch("llama")["input_ids"])
    with pytest.raises(RuntimeError, match=r"none of the 3 sites ran in 8 .*never calls 'model\.layers\.0'"):
        model(input_ids=make_batch("llama")["input_ids"])
    with model.deterministic():
        model(input_ids=make_batch("llama")["input_ids"])


@pytest.mark.parametrize("level", [0.1, "auto"])
def test_a_copied_adapter_needs_no_calibration_of_its_own(level):
    model = get_dip_model(
        build_with_outliers(), DipConfig(weights=LoraConfig(), init_noise_std=level), [make_outlier_batch()]
    )
    expected = model.noise_summary()
    model.add_adapter("twin", model.peft_config["default"])
    model.set_adapter("twin")
    assert not model.needs_calibration and model.noise_summary() == expected
    model.add_adapter("other", DipConfig(weights=LoraConfig(), init_noise_std=level))
    model.set_adapter("other")
    assert model.needs_calibration


def test_a_model_without_an_adapter_says_so():
    model = calibrated_model(weights="frozen")
    model.delete_adapter("default")
    for ask in (
        lambda: dip_loss(model, make_batch("llama")),
        model.prior_loss,
        lambda: model.export_weights_adapter(""),
    ):
        with pytest.raises(ValueError, match=r"last DIP adapter was deleted: call add_adapter.* and set_adapter"):
            ask()
    model.add_adapter("new", DipConfig(weights="frozen", init_noise_std=0.1, noise_scale="absolute"))
    model.set_adapter("new")
    assert dip_loss(model, make_batch("llama")).loss.isfinite()


def test_what_calibration_found_is_read_from_a_saved_adapter_alone(batch, tmp_path):
    saved = dip_model(calibration=[batch], init_noise_std=0.2)
    saved.save_pretrained(tmp_path)
    model = dip_model(noise_scale="relative")
    logvars = [logvar.clone() for logvar in model.logvars()]
    model.load_calibration(str(tmp_path / "adapter_model.safetensors"))
    assert model.init_noise_std == saved.init_noise_std and not model.needs_calibration
    for row, expected in zip(model.noise_summary(), saved.noise_summary(), strict=True):
        assert row["scale"] == expected["scale"]
    assert all(map(torch.equal, model.logvars(), logvars))
