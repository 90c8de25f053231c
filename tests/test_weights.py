"""The adapter of the network's own weights: its export, and what cannot be trained or loaded."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig

from dipnet_hf import DipConfig, get_dip_model
from tests.helpers import WEIGHTS, assert_no_trace, assert_same, calibrated_model, logits, trained_model
from tests.tiny_models import build, make_batch

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
