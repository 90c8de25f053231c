"""The plugin of Axolotl: on stand-ins for what it takes from Axolotl, and one whole run where Axolotl is installed."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from dipnet_hf import DipConfig, DipTrainerMixin, get_dip_model
from tests.helpers import losses, make_rows, make_trainer
from tests.tiny_models import build, make_batch

pydantic = pytest.importorskip("pydantic", reason="Axolotl's settings are pydantic models")

ROOT = Path(__file__).parents[1]
HAS_AXOLOTL = importlib.util.find_spec("axolotl") is not None  # asked before the stand-ins are there


class Settings(dict):
    """Axolotl's `cfg`: what is not set is None."""

    __getattr__ = dict.get


class AxolotlTrainer(Trainer):
    """Takes what Axolotl gives to its trainer beside the arguments of `Trainer`."""

    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)


def load_lora(model, cfg, inference=False, config_only=False):
    assert config_only
    return None, LoraConfig(r=cfg.lora_r, target_modules=cfg.lora_target_modules, task_type="CAUSAL_LM")


STAND_INS = {
    "axolotl": {},
    "axolotl.integrations": {},
    "axolotl.integrations.base": {
        "BasePlugin": type("BasePlugin", (), {}),
        "AdapterCapabilities": dataclasses.make_dataclass(
            "AdapterCapabilities", [("name", str), ("lora_like", bool, False), ("relora", bool, False)]
        ),
    },
    "axolotl.loaders": {"load_lora": load_lora},
    "axolotl.core": {},
    "axolotl.core.trainers": {},
    "axolotl.core.trainers.base": {"AxolotlTrainer": AxolotlTrainer},
}


@pytest.fixture(scope="module")
def plugins():
    """The module of the plugin, on the stand-ins."""
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in STAND_INS.items():
            module = ModuleType(name)
            vars(module).update(contents)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "dipnet_hf.axolotl", raising=False)
        yield importlib.import_module("dipnet_hf.axolotl")
    sys.modules.pop("dipnet_hf.axolotl", None)


@pytest.fixture
def plugin(plugins):
    return plugins.DipPlugin()


def dip_settings(**settings):
    defaults = {"adapter": "dip", "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
    return Settings(**defaults | {"dip": {"init_noise_std": 0.1}} | settings)


# ---- settings ----


@pytest.fixture
def validate(plugins, plugin):
    """Return a function that checks settings as Axolotl does: by a class of its own settings and the plugin's."""

    class Own(pydantic.BaseModel):
        adapter: str | None = None
        lora_r: int | None = None
        load_in_4bit: bool | None = None
        load_in_8bit: bool | None = None
        rl: str | None = None
        reward_model: bool | None = None
        process_reward_model: bool | None = None

    module, name = plugin.get_input_args().rsplit(".", 1)
    assert module == plugins.__name__
    return type("Both", (Own, getattr(plugins, name)), {})


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": "lora", "load_in_8bit": True},
        {"adapter": "dip", "lora_r": 8},
        {"adapter": "dip", "dip": {"weights": "frozen", "init_noise_std": 0.1}},
        {"adapter": "dip", "dip": {"weights": {"peft_type": "IA3", "target_modules": ["q_proj"]}}},
    ],
)
def test_what_works_is_let_through(validate, settings):
    assert validate(**settings).dip == settings.get("dip", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora", "dip": {"num_samples": 2}}, "dip: needs `adapter: dip`, got `adapter: lora`"),
        ({"adapter": "dip", "lora_r": 8, "load_in_4bit": True}, "ignores load_in_4bit .* saved in 4 or 8 bits"),
        ({"adapter": "dip", "lora_r": 8, "load_in_8bit": True}, "ignores load_in_4bit and load_in_8bit"),
        ({"adapter": "dip", "lora_r": 8, "rl": "dpo"}, "not for rl or reward models.*DipTrainerMixin"),
        ({"adapter": "dip", "lora_r": 8, "reward_model": True}, "not for rl or reward models"),
        ({"adapter": "dip"}, "needs lora_r .* or dip.weights.*got lora_r=None and dip={}"),
        ({"adapter": "dip", "lora_r": 8, "dip": {"weights": "full"}}, "not both"),
        ({"adapter": "dip", "lora_r": 8, "dip": {"num_sample": 2}}, "argument 'num_sample'.*fields of DipConfig"),
        ({"adapter": "dip", "lora_r": 8, "dip": {"num_samples": 0}}, "num_samples must be an integer of at least 1"),
    ],
)
def test_what_would_be_ignored_or_fail_is_refused(validate, settings, message):
    with pytest.raises(ValueError, match=message):
        validate(**settings)


# ---- the adapter ----


def test_it_is_known_as_an_adapter_that_is_no_lora(plugin):
    (capabilities,) = plugin.get_adapter_capabilities()
    assert capabilities.name == "dip" and not capabilities.lora_like and not capabilities.relora


def test_other_adapters_are_left_to_axolotl(plugin):
    settings = dip_settings(adapter="lora")
    assert plugin.load_adapter(build("llama"), settings) is None
    assert plugin.get_trainer_cls(settings) is None


def test_the_noise_stands_around_the_lora_of_axolotls_settings(plugin):
    model, config = plugin.load_adapter(build("llama"), dip_settings())
    assert isinstance(config, DipConfig) and config.init_noise_std == 0.1
    assert config.weights.r == 4 and config.weights.target_modules == {"q_proj", "v_proj"}
    expected = get_dip_model(build("llama"), config)
    assert model.state_dict().keys() == expected.state_dict().keys()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.rsplit(".", 2)[-2] for name in trained} >= {"dip_logvar"}
    assert all("lora_" in name or "dip_logvar" in name for name in trained)


def test_weights_of_its_own(plugin):
    weights = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    settings = dip_settings(lora_r=None, dip=Settings(weights=Settings(weights)))
    model, config = plugin.load_adapter(build("llama"), settings, config_only=True)
    assert model is None and config.weights.peft_type == "IA3" and config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("inference", [False, True])
def test_an_adapter_goes_on_from_its_folder(plugin, tmp_path, inference):
    saved = get_dip_model(build("llama"), DipConfig(weights="frozen", init_noise_std=0.3), [make_batch("llama")] * 2)
    saved.save_pretrained(tmp_path)
    settings = dip_settings(lora_model_dir=str(tmp_path))
    model, config = plugin.load_adapter(build("llama"), settings, inference=inference)
    assert config.weights == "frozen" and model.noise_summary() == saved.noise_summary()
    assert all(logvar.requires_grad is not inference for logvar in model.logvars())


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # raised by peft 0.21
def test_a_base_that_was_saved_in_4_bits_is_prepared(plugin, tmp_path):
    pytest.importorskip("bitsandbytes", minversion="0.50", reason="4 bits on a CPU need bitsandbytes 0.50")
    build("llama", hidden_size=64).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config, device_map="cpu")
    whole.save_pretrained(tmp_path / "quantized")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", device_map="cpu")
    model, _ = plugin.load_adapter(base, dip_settings())
    layer = model.get_base_model().model.layers[0]
    assert layer.self_attn.k_proj.weight.dtype == torch.uint8  # two weights of 4 bits each
    assert layer.input_layernorm.weight.dtype == torch.float32  # as PEFT prepares a quantized model
    assert all(logvar.dtype == torch.float32 and logvar.requires_grad for logvar in model.logvars())


# ---- the trainer ----


def test_axolotls_trainer_takes_the_steps_of_ours(plugin, tmp_path):
    runs = []
    for trainer_class in (plugin.get_trainer_cls(dip_settings()), None):
        torch.manual_seed(0)
        model, _ = plugin.load_adapter(build("llama"), dip_settings())
        given = {} if trainer_class is None else {"trainer_class": trainer_class}
        trainer = make_trainer(model, make_rows(), tmp_path, **given)
        trainer.train()
        runs.append(trainer)
    assert isinstance(runs[0], AxolotlTrainer) and isinstance(runs[0], DipTrainerMixin)
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert runs[0].state.log_history[0]["prior"] > 0


# ---- Axolotl itself ----


@pytest.mark.skipif(not HAS_AXOLOTL, reason="axolotl is not installed: it pins older transformers and peft than ours")
def test_axolotl_trains(shared, tmp_path):
    """A whole run of Axolotl 0.19 on the 260K Llama."""
    rows = (shared / "data" / "gsm8k" / "train.jsonl").read_text().splitlines(keepends=True)[:8]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    columns = {"field_instruction": "question", "field_output": "answer"}
    data_set = {"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": columns}
    settings = {
        **{"base_model": str(shared / "models" / "stories260K"), "datasets": [data_set], "sequence_len": 256},
        **{"plugins": ["dipnet_hf.axolotl.DipPlugin"], "adapter": "dip", "dip": {"init_noise_std": 0.1}},
        **{"lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "micro_batch_size": 2, "max_steps": 2},
        **{"learning_rate": 1e-3, "optimizer": "adamw_torch", "lr_scheduler": "cosine", "bf16": False},
        **{"gradient_accumulation_steps": 1, "attn_implementation": "sdpa", "logging_steps": 1},
        **{"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "axolotl.cli.train", str(tmp_path / "run.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    log = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["prior"] > 0 and log[0]["noise_std_mean"] == pytest.approx(0.1, rel=0.05)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "DIP"
