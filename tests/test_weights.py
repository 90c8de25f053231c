"""The adapter of the network's own weights: its export, and what cannot be trained or loaded."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from safetensors.torch import load_file

from dipnet_hf import DipConfig, get_dip_model
from tests.helpers import WEIGHTS, assert_no_trace, assert_same, calibrated_model, dip_model, logits, trained_model
from tests.tiny_models import build, build_task, make_batch, make_task_batch

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


@pytest.mark.parametrize("target_modules", ["all-linear", ["nope"]])
def test_weights_that_find_no_layer_are_named_and_change_nothing(target_modules):
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3))
    names = [name for name, _ in base.named_modules()]
    config = DipConfig(weights=LoraConfig(target_modules=target_modules), target_modules=["1"])
    with pytest.raises(ValueError, match='weights: LoraConfig does not fit Sequential.*"full" or "frozen"'):
        get_dip_model(base, config)
    assert [name for name, _ in base.named_modules()] == names and not hasattr(base, "peft_config")


def test_exported_weights_load_without_this_package(tmp_path):
    batch = make_batch("llama")
    torch.save(batch, tmp_path / "batch.pt")
    build("llama").save_pretrained(tmp_path / "base")
    expected = {}
    for weights in EXPORTED:
        model = trained_model("llama", weights)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.export_weights_adapter(tmp_path / weights)
        assert json.loads(tmp_path.joinpath(weights, "adapter_config.json").read_text())["inference_mode"]
        expected[weights] = logits(model)
        assert_same(model, trained_model("llama", weights))  # exporting has changed nothing
    command = [sys.executable, "-c", LOAD_EXPORTS, str(tmp_path), *EXPORTED]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for weights in EXPORTED:
        assert torch.equal(torch.load(tmp_path / weights / "logits.pt"), expected[weights]), weights


@pytest.mark.parametrize("weights", ["full", "frozen"])
def test_there_is_nothing_to_export(tmp_path, weights):
    with pytest.raises(ValueError, match=f"weights='{weights}' has no PEFT adapter to export.*merge_and_unload"):
        calibrated_model(weights=weights).export_weights_adapter(tmp_path)


@pytest.mark.parametrize(("held", "added"), [("frozen", "full"), ("full", "frozen"), ("lora", "full")])
def test_full_weights_allow_no_other_adapter(held, added):
    model = calibrated_model(weights=held)
    keys = list(model.state_dict())
    config = DipConfig(weights=WEIGHTS[added]("llama"), task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match='weights="full"'):
        model.add_adapter("second", config)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("weights", ["lora", "full", "frozen"])
@pytest.mark.parametrize("shape", [{"num_layers": 2}, {"num_layers": 4}, {"hidden_size": 16}], ids=str)
def test_an_adapter_of_another_shape_is_refused(tmp_path, weights, shape):
    trained_model(weights=weights).save_pretrained(tmp_path)
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


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and "dip_" not in name}


def saved_names(model, folder):
    model.save_pretrained(folder)
    return {name for name in load_file(folder / "adapter_model.safetensors") if "dip_" not in name}


def move_away(model):
    """Change every parameter that learns."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def task_outputs(model, name):
    """Everything that a model answers on its batch, the loss first."""
    return [output for output in model(**make_task_batch(name)).to_tuple() if isinstance(output, torch.Tensor)]


TASK_TYPES = {"classes": TaskType.SEQ_CLS, "tokens": "TOKEN_CLS", "spans": "QUESTION_ANS"}
TASK_WEIGHTS = {
    "lora": lambda **task: LoraConfig(target_modules=["q_proj", "query"], **task),
    "lora and saved": lambda **task: LoraConfig(
        target_modules=["q_proj", "query"], modules_to_save=["embed_tokens", "word_embeddings"], **task
    ),
    "ia3": lambda **task: IA3Config(target_modules=["k_proj", "key"], feedforward_modules=[], **task),
}


@pytest.mark.parametrize("said_on", ["weights", "DipConfig"])
@pytest.mark.parametrize("weights", TASK_WEIGHTS)
@pytest.mark.parametrize("name", TASK_TYPES)
def test_a_task_trains_and_saves_the_head_as_peft_does(name, weights, said_on, tmp_path):
    task = {"task_type": TASK_TYPES[name]}
    inner, outer = (task, {}) if said_on == "weights" else ({}, task)
    stock = get_peft_model(build_task(name), TASK_WEIGHTS[weights](**task))
    model = dip_model(build_task(name), weights=TASK_WEIGHTS[weights](**inner), noise_scale="absolute", **outer).eval()
    assert type(model) is type(stock)
    assert trained_names(model) == trained_names(stock)
    assert saved_names(model, tmp_path) == saved_names(stock, tmp_path / "stock")

    move_away(model)
    model.save_pretrained(tmp_path)
    model.export_weights_adapter(tmp_path / "exported")
    for folder in (tmp_path, tmp_path / "exported"):
        base = build_task(name)
        for head in ("score", "classifier", "qa_outputs"):
            if hasattr(base, head):
                torch.nn.init.normal_(getattr(base, head).weight)  # as when it is new
        loaded = PeftModel.from_pretrained(base, folder).eval()
        for ours, theirs in zip(task_outputs(model, name), task_outputs(loaded, name), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TASK_TYPES)
def test_all_linear_layers_are_those_below_the_head(name):
    """Stock PEFT puts an adapter on the head of two of these tasks, and cannot save it whole then."""
    weights = LoraConfig(target_modules="all-linear")
    model = dip_model(build_task(name), weights=weights, noise_scale="absolute", task_type=TASK_TYPES[name])
    head = {"classes": "score", "tokens": "classifier", "spans": "qa_outputs"}[name]
    trained = {part for part in trained_names(model) if f".{head}." in part}
    assert trained and not any("lora" in part for part in trained)


@pytest.mark.parametrize("weights", ["full", "frozen"])
@pytest.mark.parametrize("name", TASK_TYPES)
def test_a_task_changes_nothing_where_all_weights_train_or_none(name, weights, tmp_path):
    typed, untyped = (
        dip_model(build_task(name), weights=weights, noise_scale="absolute", task_type=task_type).eval()
        for task_type in (TASK_TYPES[name], None)
    )
    assert trained_names(typed) == trained_names(untyped)
    move_away(typed)
    typed.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_task(name), tmp_path).eval()
    for ours, theirs in zip(task_outputs(typed, name), task_outputs(loaded, name), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", TASK_TYPES)
def test_a_site_in_a_head_that_is_saved_whole_is_refused(name):
    model = build_task(name)
    head = {"classes": "score", "tokens": "classifier", "spans": "qa_outputs"}[name]
    config = DipConfig(weights=LoraConfig(), task_type=TASK_TYPES[name], target_modules=[head])
    with pytest.raises(ValueError, match=rf"sites \['{head}'\] lie in modules.*a task_type adds its head"):
        get_dip_model(model, config)
    assert_no_trace(model)


@pytest.mark.parametrize(
    "weights",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": r".*(embed_tokens|lm_head|q_proj)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [62, 63]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_saved_where_peft_saves_them(weights, tied, tmp_path):
    """Spare rows of the vocabulary were filled by hand, which no base model on disk knows of."""

    def base(filled):
        model = build("llama")
        model.config.tie_word_embeddings = tied
        if tied:
            model.tie_weights()
        if filled:
            model.model.embed_tokens.weight.data[62:] = 1.0
        return model

    weights = {**weights, "ensure_weight_tying": tied}
    model = dip_model(base(True), weights=LoraConfig(**weights), noise_scale="absolute").eval()
    stock = get_peft_model(base(True), LoraConfig(**weights)).eval()
    move_away(model)
    assert saved_names(model, tmp_path) == saved_names(stock, tmp_path / "stock")
    if "trainable_token_indices" not in weights:
        loaded = PeftModel.from_pretrained(base(False), tmp_path).eval()
        batch = {"input_ids": torch.tensor([[3, 62, 63, 5]])}
        assert torch.equal(logits(model, batch), logits(loaded, batch))


def test_a_copy_of_full_weights_is_refused():
    """The copy would train and change the very weights that it is a copy of."""
    model = calibrated_model(weights="full")
    with pytest.raises(ValueError, match='weights="full" changes the base weights'):
        model.add_adapter("copy", model.peft_config["default"])
    assert_same(model, calibrated_model(weights="full"))
