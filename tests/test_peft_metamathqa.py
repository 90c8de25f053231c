"""PEFT's benchmark from an experiment's folder to its result: the keys are PEFT's, and answers are read as there."""

import json
from pathlib import Path

import pytest
from peft import PeftConfig
from transformers import Trainer

from benchmarks import peft_metamathqa
from benchmarks.peft_metamathqa import DEFAULTS, FIXED, final_answer, is_right, read_params
from dipnet_hf import DipConfig, DipTrainer

EXPERIMENTS = Path(peft_metamathqa.__file__).parent / "experiments"
# As PEFT 0.21 writes them, in its own repository.
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN_INFO = {
    *{"accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time"},
    *{"file_size", "num_trainable_params", "num_total_params", "status", "metrics"},
}
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
VALID_METRICS = {
    *{"step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec"},
    *{"mem allocated avg", "mem reserved avg", "elapsed time"},
}
TEST_METRICS = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}


@pytest.mark.parametrize("method", ["dip", "lora"])
def test_an_experiment_ends_with_pefts_keys(method, shared, few_problems, tmp_path, monkeypatch):
    experiment = tmp_path / "experiments" / method / "tiny"
    experiment.mkdir(parents=True)
    config = EXPERIMENTS / method / "llama-3.2-3B-rank32" / "adapter_config.json"
    (experiment / "adapter_config.json").write_text(config.read_text())
    params = {"model_id": str(shared / "models" / "stories260K"), "dtype": "float32", "max_steps": 4, "eval_steps": 2}
    params |= {"generation_kwargs": {"max_new_tokens": 4}, "max_seq_length": 64}
    (experiment / "training_params.json").write_text(json.dumps(params))
    trained = []
    for trainer_class in (DipTrainer, Trainer):

        class Noted(trainer_class):
            def train(self, *args, made_of=trainer_class, **kwargs):
                trained.append(made_of)
                return super().train(*args, **kwargs)

        monkeypatch.setattr(peft_metamathqa, trainer_class.__name__, Noted)
    data = str(few_problems)
    results = tmp_path / "results"
    peft_metamathqa.main([str(experiment), "--train", data, "--test", data, "--results", str(results)])
    result = json.loads((results / f"{method}--tiny.json").read_text())

    assert trained == [DipTrainer if method == "dip" else Trainer]
    assert set(result) == {"run_info", "train_info", "meta_info", "provenance"}
    run, train, meta = result["run_info"], result["train_info"], result["meta_info"]
    assert set(run) == RUN_INFO and set(train) == TRAIN_INFO and set(meta) == META_INFO
    assert run["experiment_name"] == f"{method}/tiny" and run["train_config"] == DEFAULTS | FIXED | params
    assert run["peft_config"]["peft_type"] == method.upper() and train["status"] == "success"
    *valid, test = train["metrics"]
    assert [set(row) for row in valid] == [VALID_METRICS] * 2 and set(test) == TEST_METRICS
    assert [row["step"] for row in train["metrics"]] == [2, 4, 4]
    assert [row["train samples"] for row in valid] == [8, 16]
    assert 0 < train["num_trainable_params"] < train["num_total_params"] and train["file_size"] > 0
    assert 4 * 4 * 20 < test["train total tokens"] <= 4 * 4 * 65
    assert run["total_time"] >= train["train_time"] > 0
    assert {"peft-version", "torch-version", "transformers-version"} <= set(meta["package_info"])


def test_the_experiments_are_one_lora_with_and_without_noise():
    configs = [
        PeftConfig.from_pretrained(str(EXPERIMENTS / method / "llama-3.2-3B-rank32")) for method in ("dip", "lora")
    ]
    assert isinstance(configs[0], DipConfig)
    assert configs[0].weights.to_dict() == configs[1].to_dict()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_step": 3}, "no parameter 'max_step'. Did you mean 'max_steps'"),
        ({"compile": True}, "compile must be False here, got True"),
        ({"optimizer_type": "lora-fa"}, "optimizer_type must be 'AdamW' here"),
        ({"optimizer_kwargs": {"lr": 1e-4, "betas": [0.9, 0.95]}}, "optimizer_kwargs has .*betas"),
    ],
)
def test_other_parameters_are_refused(params, message, tmp_path):
    (tmp_path / "training_params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=message):
        read_params(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 8 = 13\n#### 13", 13.0),
        ("The answer is: 3. No. The answer is: 7.\nQuestion: what else?", 7.0),
        ("The final answer is $65.50.", 65.5),
        ("The answer is: 20/8", 2.5),
        ("The answer is: 50%", 50.0),
        ("The answer is: \\\\sqrt{2}", "\\\\sqrt{2}"),
        ("The answer is: 1/0", "1/0"),
        ("It is 13.", None),
    ],
)
def test_final_answers(text, expected):
    assert final_answer(text) == expected


def test_answers_are_compared_as_numbers():
    assert is_right("The answer is: 2.50", "#### 5/2")
    assert not is_right("2.5", "#### 2.5")
    with pytest.raises(ValueError, match="No final answer.*in the row's answer 'none'"):
        is_right("#### 1", "none")
