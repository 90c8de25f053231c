"""Every regularizer through the fine-tuning recipe on a real model, a Llama of 260,000 parameters."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dipnet_hf.regularizers import METHODS
from dipnet_hf.regularizers.samples import SampledRegularizer
from recipes import finetune
from recipes.config import load_config
from tests.helpers import losses, read_results
from tests.recipes.conftest import WEIGHTS, write_problems

# What methods need that have no effect, or none in two steps, as they come.
SETTINGS = {
    "r_drop": {"layer_dropout": 0.1},
    "self_distillation": {"layer_dropout": 0.1},
    "l2_sp": {"weight": 1e4},
}
LORA_SETTINGS = {"monteclora": {"monteclora_config": {"num_samples": 2, "buffer_size": 1}}}


def write_config(folder, model, problems, **values):
    """Write a configuration of two steps, whose run lies in `folder / "run"`, and return its file."""
    config = {
        "model": str(model),
        "dataset": str(problems),
        "max_length": 64,
        "weights": "full",
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "evaluation": {"tasks": []},
        **values,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


@pytest.fixture
def configure(model_folder, problems_folder, tmp_path):
    """Return a function that writes a configuration of the test's run and returns its file."""
    return lambda model=model_folder, **values: write_config(tmp_path, model, problems_folder, **values)


@pytest.fixture(scope="module")
def plain_nlls(shared, tmp_path_factory):
    """The NLL of runs without any method, by the weights that learn."""
    found = {}
    for name, weights in WEIGHTS.items():
        folder = tmp_path_factory.mktemp(name)
        problems = write_problems(folder / "problems")
        finetune.main([write_config(folder, shared / "models" / "stories260K", problems, weights=weights)])
        found[name] = read_results(folder / "run")["metrics"]["eval_nll"]
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_through_the_recipe(configure, shared, plain_nlls, tmp_path, name, weights):
    """And takes part; only TFB leaves the network without its noise as plain training has made it."""
    regularizer = {"name": name, **SETTINGS.get(name, {})}
    own = "full" if weights == "full" else WEIGHTS[weights] | LORA_SETTINGS.get(name, {})
    config = configure(shared / "models" / "stories260K", weights=own, regularizer=regularizer)
    if METHODS[name].needs_lora and weights == "full":
        with pytest.raises(ValueError, match=f"{METHODS[name].__name__} .* LoRA"):
            finetune.main([config])
        return
    finetune.main([config])
    results = read_results(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2
    nll = results["metrics"]["eval_nll"]
    assert nll == pytest.approx(plain_nlls[weights], rel=0.5)
    assert (nll == pytest.approx(plain_nlls[weights], rel=1e-6)) == (name == "tfb")
    assert (tmp_path / "run" / "regularizer.json").is_file()


def test_two_noises_with_an_ensemble_each_are_refused(configure):
    with pytest.raises(ValueError, match="tfb with dip: each has an ensemble of its own"):
        load_config(configure(weights=WEIGHTS["lora"], dip={}, regularizer={"name": "tfb"}))


def test_a_run_that_had_ended_is_scored_with_its_average(configure, tmp_path):
    """Killed after its last checkpoint, it is only loaded: the network that writes answers is the mean too."""
    average = {
        "regularizer": {"name": "weight_average"},
        "evaluation": {"tasks": ["gsm8k_local"], "max_new_tokens": 2},
    }
    training = yaml.safe_load(Path(configure()).read_text())["training"] | {"save_strategy": "steps", "save_steps": 2}
    config = configure(**average, training=training)
    finetune.main([config])
    (tmp_path / "run" / "results.json").rename(tmp_path / "once.json")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    finetune.main([config])
    once, again = (
        json.loads(path.read_text()) for path in (tmp_path / "once.json", tmp_path / "run" / "results.json")
    )
    assert once["scores"] == again["scores"]
    for name, tensor in load_file(tmp_path / "run" / "model.safetensors").items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if issubclass(method, SampledRegularizer)])
def test_a_method_with_samples_is_scored_as_their_mean(configure, tmp_path, name):
    evaluation = {"tasks": ["gsm8k_local"], "num_samples": 2, "max_new_tokens": 2}
    finetune.main([configure(weights=WEIGHTS["lora"], regularizer={"name": name}, evaluation=evaluation)])
    results = read_results(tmp_path / "run")
    plain, mean = (results[name]["gsm8k_local"]["eval_nll"] for name in ("scores", "ensemble_scores"))
    assert plain != mean == pytest.approx(plain, rel=0.1)


def test_samples_of_a_method_without_any_are_refused(configure):
    evaluation = {"tasks": ["gsm8k_local"], "num_samples": 2}
    with pytest.raises(ValueError, match="a plain model has no noisy passes; .* blob, layer_dropout, tfb"):
        load_config(configure(regularizer={"name": "sam"}, evaluation=evaluation))


def test_a_method_runs_beside_dip(configure, tmp_path):
    finetune.main([configure(dip={"init_noise_std": 0.1}, regularizer={"name": "sam", "rho": 0.01})])
    assert read_results(tmp_path / "run")["noise"]


@pytest.mark.parametrize(
    ("regularizer", "message"),
    [
        ({"name": "sma"}, "must have a name.*did you mean sam"),
        ("sam", r"must have a name, such as \{name: sam\}, got 'sam'"),
        ({"rho": 0.1}, "must have a name"),
        ({"name": "sam", "roh": 0.1}, "Unknown key regularizer.roh; did you mean regularizer.rho"),
        ({"name": "sam", "rho": -1.0}, "rho of SAM must be positive"),
    ],
    ids=str,
)
def test_a_method_that_is_not_there_is_refused(configure, regularizer, message):
    with pytest.raises(ValueError, match=message):
        load_config(configure(regularizer=regularizer))


@pytest.mark.parametrize("samples_at_inference", [False, True])
def test_pvera_trains_and_samples_where_it_is_asked_to(configure, model_folder, tmp_path, samples_at_inference):
    """PEFT's own, a comparator that is a kind of weights."""
    weights = {"peft_type": "PVERA", "r": 4, "target_modules": "all-linear", "d_initial": 1.0}
    finetune.main([configure(weights=weights | {"sample_at_inference": samples_at_inference})])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    learned = [parameter for name, parameter in model.named_parameters() if "pvera_lambda_b" in name]
    assert all(vector.any() for vector in learned)
    first, second = answers(model)
    assert torch.equal(first, second) != samples_at_inference
    assert not torch.equal(*answers(model.train()))


def test_monteclora_trains_and_answers_by_its_mean(configure, model_folder, tmp_path):
    """PEFT's own: at inference it is the LoRA of the mean, which nothing can sample."""
    monteclora = {"num_samples": 2, "buffer_size": 1, "sample_scaler": 0.1}
    finetune.main([configure(weights=WEIGHTS["lora"] | {"monteclora_config": monteclora})])
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    assert all(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    first, second = answers(model)
    assert torch.equal(first, second)
    assert not torch.equal(*answers(model.train()))
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(answers(merged)[0], first)


def answers(model):
    """Two passes."""
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits, model(input_ids=ids).logits
