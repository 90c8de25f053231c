"""The recipe's configuration: files and overrides as they are read, and every mistake named before any work."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig

from dipnet_hf import DipConfig
from recipes.config import DataSetConfig, WatchConfig, dump_config, load_config, load_distill_config

FOLDER = Path(__file__).parents[2] / "recipes" / "configs"
CONFIGS = sorted({*FOLDER.glob("*.yaml")} - {*FOLDER.glob("study-*.yaml")})  # those are in test_study

MINIMAL = {
    "model": "m",
    "dataset": "d",
    "weights": {"peft_type": "LORA", "r": 2},
    "dip": {"init_noise_std": 0.1},
    "training": {"output_dir": "runs/x"},
}


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a configuration and loads it with overrides."""

    def write_and_load(*overrides, **changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
        return load_config(str(path), list(overrides))

    return write_and_load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_repository_configs_load_and_open_with_their_launch_command(path):
    recipe, load = ("distill", load_distill_config) if "distill" in path.stem else ("finetune", load_config)
    config = load(str(path))
    assert path.read_text().startswith(f"# accelerate launch recipes/{recipe}.py recipes/configs/{path.name}\n")
    assert config.training["output_dir"] == f"runs/{path.stem}"
    config.training_arguments()


@pytest.mark.parametrize("name", ["stories260k-gsm8k", "stories260k-gsm8k-300"])
def test_plain_twin_differs_in_dip_and_folder_alone(name):
    dip, plain = (load_config(str(FOLDER / f"{name}{end}.yaml")) for end in ("", "-plain"))
    assert dip.dip is not None
    dip.dip, dip.training["output_dir"] = None, plain.training["output_dir"]
    assert dip == plain


def test_sections_become_the_libraries_own_configs(load):
    config = load()
    assert isinstance(config.peft_config(), LoraConfig) and config.peft_config().r == 2
    assert isinstance(config.dip_config(), DipConfig) and config.dip_config().init_noise_std == 0.1
    assert config.training_arguments().output_dir == "runs/x"
    assert load(dip=None).dip_config() is None
    assert load(weights="full").peft_config() == "full"


@pytest.mark.parametrize(
    "override, section, key, value",
    [
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
        ("dip.init_noise_std=.5E-1", "dip", "init_noise_std", 0.05),
        ("dip.layers_to_transform=[0, 1]", "dip", "layers_to_transform", [0, 1]),
        ("weights.r=8", "weights", "r", 8),
        ("weights.target_modules=all-linear", "weights", "target_modules", "all-linear"),
        ("training.lr_scheduler_kwargs.num_cycles=2", "training", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_overrides_reach_every_section(load, override, section, key, value):
    found = getattr(load(override), section)[key]
    assert found == value and type(found) is type(value)


def test_an_unquoted_no_is_a_strategy(load):
    assert load("training.save_strategy=no").training_arguments().save_strategy == "no"


def test_without_an_accelerator_bf16_is_for_the_cpu(load, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.warns(UserWarning, match="There is no accelerator: training.bf16 trains on the CPU"):
        arguments = load("training.bf16=true").training_arguments()
    assert arguments.bf16 and arguments.use_cpu
    assert not load("training.bf16=false").training_arguments().use_cpu
    with pytest.raises(ValueError, match="use_cpu"):
        load("training.bf16=true", "training.use_cpu=false").training_arguments()


def test_with_an_accelerator_bf16_is_for_it(load, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    assert not load("training.bf16=true").training_arguments().use_cpu


def test_overrides_reach_the_top_and_the_evaluation(load):
    config = load("max_length=64", "evaluation.limit=3", "dip=null", "evaluation.tasks=[]")
    assert (config.max_length, config.evaluation.limit, config.dip, config.evaluation.tasks) == (64, 3, None, {})


def test_an_override_makes_a_section_that_is_null(load):
    assert load("dip.init_noise_std=0.2", dip=None).dip == {"init_noise_std": 0.2}


def test_a_file_without_sign_or_point_in_its_exponents_holds_numbers(load, tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(yaml.safe_dump(MINIMAL).replace("output_dir: runs/x", "{output_dir: runs/x, learning_rate: 3e-3}"))
    assert load_config(str(path)).training["learning_rate"] == 3e-3


def test_a_dumped_configuration_loads_as_itself(load, tmp_path):
    config = load("training.learning_rate=1e-5")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    "overrides, changes, message",
    [
        ([], {"modle": "m"}, "Unknown key modle; did you mean model"),
        (["training.learning_rat=1"], {}, "Unknown key training.learning_rat; did you mean training.learning_rate"),
        (["dtype=float64"], {}, "dtype must be one of float32, bfloat16, float16 or null, got 'float64'"),
        (["dtype=bfloat16"], {"weights": "full"}, "weights: full trains in float32, got dtype: bfloat16"),
        (
            ["quantization.load_in_4bits=true"],
            {},
            "Unknown key quantization.load_in_4bits; did you mean",
        ),
        (["quantization.bnb_4bit_quant_type=nf4"], {}, "needs one of load_in_4bit: true and load_in_8bit: true, got"),
        (["quantization={load_in_4bit: true, load_in_8bit: true}"], {}, "needs one of load_in_4bit"),
        (["quantization.load_in_8bit=true"], {"weights": "full"}, "weights: full cannot train a quantized model"),
        (["num_validation_samples=0"], {}, "num_validation_samples must be a positive integer or null, got 0"),
        (["training.metric_for_best_model=nll"], {}, "choose the best checkpoint on the test problems"),
        (
            ["training.load_best_model_at_end=true"],
            {},
            "training.load_best_model_at_end would choose the best checkpoint",
        ),
        (["dip.init_std=1"], {}, "Unknown key dip.init_std; did you mean dip.init_noise_std"),
        (["dip.weights=full"], {}, "Unknown key dip.weights"),
        (["weights.rank=1"], {}, "Unknown key weights.rank; did you mean weights."),
        (["evaluation.task=[]"], {}, "Unknown key evaluation.task; did you mean evaluation.tasks"),
        (["training.learning_rate"], {}, "--set takes key=value, got 'training.learning_rate'"),
        (["training.output_dir=[a"], {}, "not valid YAML"),
        (["weights.r=1"], {"weights": "full"}, "weights is 'full' and has no keys"),
        ([], {"weights": {"peft_type": "LORRA"}}, "weights.peft_type is 'LORRA', no method .*; did you mean .*LORA"),
        ([], {"weights": "everything"}, "weights must be full, frozen or"),
        ([], {"weights": "frozen", "dip": None}, "trains nothing"),
        ([], {"training": {"seed": 1}}, "training.output_dir is not set"),
        ([], {"model": None}, "lacks model"),
        ([], {"training": "fast"}, "training must hold"),
        (["dip.init_noise_std=much"], {}, "init_noise_std must be .*, got 'much'"),
        (["max_length=0"], {}, "max_length must be a positive integer, got 0"),
        (["evaluation.limit=0.5"], {}, "evaluation.limit must be a positive integer or null, got 0.5"),
        (["evaluation.tasks=gsm8k_local"], {}, "evaluation.tasks must be a list or a mapping"),
        (["dataset=3"], {}, "path of a data set must be text, got 3"),
        (["dataset=[]"], {}, "dataset is an empty list"),
        (["dataset=[a]"], {}, "dataset must hold `key: value` lines, got 'a'"),
        (["dataset=[{weights: 1}]"], {}, "Unknown key dataset.weights; did you mean dataset.weight"),
        (["dataset=[{weight: 1}]"], {}, "has no path"),
        (["dataset=[{path: a, weight: 0}]"], {}, "The weight of a must be a positive number, got 0"),
        (["dataset=[{path: a, weight: 1}, {path: b}]"], {}, "Some data sets have a weight and some have none"),
        (["dataset=[{path: a}]", "dataset_split=b"], {}, "dataset_split is of one dataset: in a mixture, write it"),
        (["dataset=[{path: a}, {path: b}]", "num_validation_samples=3"], {}, "set validation_fraction instead"),
        (["dataset=[{path: a}, {path: b}]", "max_train_samples=3"], {}, "first data set alone: give each .* a weight"),
        (["columns=[question]"], {}, "columns must be a mapping such as {problem: question}"),
        (["validation_fraction=1"], {}, "validation_fraction must be between 0 and 1, or null, got 1"),
        (["validation_fraction=.1", "num_validation_samples=3"], {}, "both hold problems out: set one"),
        (["heldout_split=train"], {}, "heldout_split must be test or validation, got 'train'"),
        (["heldout_split=validation"], {}, "heldout_split: validation needs num_validation_samples"),
        (["apply_chat_template=chatml"], {}, "apply_chat_template must be true or false, got 'chatml'"),
        (["packing=bfd"], {}, "packing must be true or false, got 'bfd'"),
        (["system_prompt=[a]"], {}, "system_prompt must be text or null"),
        (["evaluation.while_training=8"], {}, "evaluation.while_training must hold `key: value` lines, got 8"),
        (
            ["evaluation.while_training.num_problem=8"],
            {},
            "Unknown key evaluation.while_training.num_problem;",
        ),
        (["evaluation.while_training.task=gsm8k_local"], {}, "evaluation.while_training lacks num_problems"),
        (["evaluation.while_training.num_problems=0"], {}, "while_training.num_problems must be a positive integer"),
        (
            ["evaluation.while_training.num_problems=8"],
            {},
            "evaluations on the way, .*: set training.eval_strategy",
        ),
        (["evaluation.early_stopping_patience=0"], {}, "early_stopping_patience must be a positive integer or null"),
        (["evaluation.early_stopping_patience=2"], {}, "early_stopping_patience is for evaluations on the way"),
        (
            ["evaluation.early_stopping_patience=2", "training.eval_strategy=epoch"],
            {},
            "needs to know what must get better: set training.metric_for_best_model",
        ),
        (
            ["training.metric_for_best_model=exactmatch", "validation_fraction=0.1"],
            {},
            "'exactmatch', which no evaluation reports; did you mean exact_match",
        ),
        (
            ["training.metric_for_best_model=eval_exact_match", "validation_fraction=0.1"],
            {},
            "is measured by generating: set evaluation.while_training",
        ),
    ],
)
def test_mistakes_are_named(load, overrides, changes, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides, **changes)


def test_what_watches_a_training_loads_and_says_which_way_is_better(load):
    settings = ("evaluation.while_training.num_problems=8", "training.eval_strategy=epoch", "validation_fraction=0.1")
    for metric, is_greater in (("nll", False), ("eval_nll", False), ("loss", False), ("exact_match", True)):
        config = load(*settings, "evaluation.early_stopping_patience=2", f"training.metric_for_best_model={metric}")
        arguments = config.training_arguments()
        assert arguments.greater_is_better is is_greater and arguments.restore_callback_states_from_checkpoint
    assert config.evaluation.while_training == WatchConfig(8, "gsm8k_local", "strict-match")
    given = load(*settings, "training.metric_for_best_model=nll", "training.greater_is_better=true")
    assert given.training_arguments().greater_is_better is True
    assert not given.training_arguments().restore_callback_states_from_checkpoint


def test_a_dataset_is_one_or_a_mixture(load):
    single = load("dataset_split=big", "columns={problem: question}").data_sets()
    assert single == [DataSetConfig("d", dataset_split="big", columns={"problem": "question"})]
    mixture = load("dataset=[{path: a, weight: 3}, {path: b, weight: 0.5, dataset_split: big}]").data_sets()
    assert mixture == [DataSetConfig("a", weight=3), DataSetConfig("b", dataset_split="big", weight=0.5)]
    assert load("training.metric_for_best_model=nll", "validation_fraction=0.1").validation_fraction == 0.1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="No configuration file at .*nothing.yaml"):
        load_config(str(tmp_path / "nothing.yaml"))
