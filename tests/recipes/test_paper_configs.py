"""The configurations of the paper's models, on models of the same architectures with a few thousand parameters."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, set_seed

from benchmarks.paper_models import PAPER_MODELS
from recipes import finetune
from recipes.config import load_config
from recipes.footprint import build
from recipes.running import load_base
from tests.helpers import read_results

CONFIGS = {
    path.stem: load_config(str(path))
    for path in sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))
    if not {"distill", "study"} & {*path.stem.split("-")} and load_config(str(path)).model in PAPER_MODELS
}
QUANTIZED = [name for name, config in CONFIGS.items() if config.quantization is not None]
# One of each architecture, and one of them quantized.
DRY_RUNS = ["qwen2.5-3b-gsm8k", "llama-3.2-3b-gsm8k", "gemma-3-4b-gsm8k", "qwen2.5-3b-gsm8k-qlora"]
TEXT = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def shrink(config, tokenizer):
    """A config of the same kind, small."""
    values = config.to_dict()
    text = values.get("text_config", values)
    text |= {**TEXT, "vocab_size": len(tokenizer), "layer_types": None}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if "vision_config" in values:
        values["vision_config"] |= {**VISION, "image_size": 28}
        values |= {"mm_tokens_per_image": 4, "eos_token_id": tokenizer.eos_token_id}
    return type(config)(**values)


@pytest.fixture(scope="session")
def small_models(tokenizer, tmp_path_factory):
    """Folders of small models by the names of the large ones."""
    folders = {}
    for number, (name, config) in enumerate(PAPER_MODELS.items()):
        set_seed(number)
        folders[name] = tmp_path_factory.mktemp("paper") / "model"
        model = AutoModelForCausalLM.from_config(shrink(config, tokenizer), dtype=torch.bfloat16)
        model.generation_config.cache_implementation = None
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture
def run(small_models, problems_folder, tmp_path):
    """Return a function that runs a configuration on its small model and the tests' problems."""

    def run_recipe(name, *arguments):
        folder = Path(__file__).parents[2] / "recipes" / "configs"
        here = [f"model={small_models[CONFIGS[name].model]}", f"dataset={problems_folder}", "training.use_cpu=true"]
        finetune.main(
            [str(folder / f"{name}.yaml"), "--set", *here, f"training.output_dir={tmp_path / 'run'}", *arguments]
        )
        return tmp_path / "run"

    return run_recipe


def test_every_model_has_its_configurations():
    of_gsm8k = {name: config for name, config in CONFIGS.items() if config.dataset == "openai/gsm8k"}
    found = sorted((config.model, config.quantization is not None) for config in of_gsm8k.values())
    assert found == sorted((model, is_quantized) for model in PAPER_MODELS for is_quantized in (False, True))
    (other,) = CONFIGS.keys() - of_gsm8k.keys()
    assert CONFIGS[other].dataset == "meta-math/MetaMathQA"
    assert CONFIGS[other].columns == {"query": "question", "response": "answer"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_differs_in_what_must_differ(name):
    values, common = asdict(CONFIGS[name]), asdict(CONFIGS["qwen2.5-3b-gsm8k"])
    assert values["training"].pop("output_dir") == f"runs/{name}"
    common["training"].pop("output_dir")
    values["weights"].pop("exclude_modules", None)
    different = {key for key in common if values[key] != common[key]}
    of_data = {"dataset", "columns", "evaluation"} if "metamath" in name else set()
    assert different <= {"model", "quantization", *of_data}
    assert all(CONFIGS[quantized].quantization == CONFIGS[QUANTIZED[0]].quantization for quantized in QUANTIZED)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_trains_its_text_model(name, small_models):
    """What the configuration would load and wrap, on the meta device, and its plain twin."""
    config = CONFIGS[name]
    config = load_config(f"recipes/configs/{name}.yaml", [f"model={small_models[config.model]}", "quantization=null"])
    model = build(config)
    learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not [name for name in learn if "vision" in name]
    per_layer = 2 * 7 + 1  # A and B of all linears, and the log-variances
    assert len(learn) == 2 * per_layer
    config.dip = None
    assert len([p for p in build(config).parameters() if p.requires_grad]) == 2 * (per_layer - 1)


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_passes(run, name, capsys):
    if name in QUANTIZED:
        pytest.importorskip("bitsandbytes", reason="quantized models need bitsandbytes")
    run(name, "--dry-run")
    printed = capsys.readouterr().out
    assert printed.count("relative std auto") == 2 and "1 steps" in printed


def test_gemmas_wrapper_is_trained_scored_and_saved_as_text(run, tokenizer):
    """Gemma 3 of 4B and more is a `Gemma3ForConditionalGeneration`, also where no picture is read."""
    folder = run(
        "gemma-3-4b-gsm8k",
        *("dip={init_noise_std: 0.1}", "evaluation={tasks: [gsm8k_local], max_new_tokens: 2, limit: 2}"),
        *("training.max_steps=2", "training.bf16=false", "dtype=float32", "training.logging_steps=1"),
    )
    config = load_config(str(folder / "config.yaml"))
    results = read_results(folder)
    assert [row["name"] for row in results["noise"]] == [f"model.language_model.layers.{n}" for n in range(2)]
    assert all(entry["grad_norm"] > 0 for entry in results["log_history"] if "grad_norm" in entry)
    base = load_base(config)
    assert type(base).__name__ == "Gemma3ForConditionalGeneration"
    model = PeftModel.from_pretrained(base, folder).eval()
    assert not [name for name in model.state_dict() if "vision" in name and "lora" in name]
    ids = tokenizer("Question: 12 + 12?\nAnswer: #### 24</s>", return_tensors="pt")["input_ids"]
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    expected = -log_probs.gather(1, ids[0, 1:, None]).mean()
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected)
    assert results["metrics"]["eval_nll"] > 0 and results["scores"]["gsm8k_local"]["n"] == 2
