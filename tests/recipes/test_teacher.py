"""The teacher of a distillation: what a run of a method with samples teaches, and which runs can teach nothing."""

import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dipnet_hf.batches import supervised
from dipnet_hf.noise import KeySource
from recipes import distill, finetune
from recipes.config import DistillConfig
from recipes.data import make_collator, prepare_data
from recipes.running import load_tokenizer
from recipes.teacher import load_teacher, load_teacher_config
from tests.helpers import read_results, write_jsonl
from tests.recipes.conftest import write_problems

LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
RUNS = {
    "dropout of all weights": {"weights": "full", "regularizer": {"name": "layer_dropout", "p": 0.2}},
    "BLoB": {"weights": LORA, "regularizer": {"name": "blob"}},
    "TFB": {"weights": LORA, "regularizer": {"name": "tfb"}},
}


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Finished runs by name; not to be changed."""
    root, folders = tmp_path_factory.mktemp("runs"), {}
    problems = write_problems(root / "problems")
    training = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "seed": 0, "use_cpu": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        for number, (name, changed) in enumerate(RUNS.items()):
            folders[name] = root / str(number)
            config = {
                "model": str(model_folder),
                "dataset": str(problems),
                "max_length": 64,
                "dip": None,
                "training": {"output_dir": str(folders[name]), "save_strategy": "no", **training},
                "evaluation": {"tasks": [], "num_samples": 2},
                **changed,
            }
            (root / f"{number}.yaml").write_text(yaml.safe_dump(config))
            finetune.main([str(root / f"{number}.yaml")])
    return folders


@pytest.fixture
def batch(runs):
    """A training batch of two rows."""
    run = load_teacher_config(str(runs["BLoB"]))
    tokenizer = load_tokenizer(run)
    rows = prepare_data(run, tokenizer).train
    return make_collator(tokenizer)([rows[number] for number in (0, 5)])


def inputs_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", RUNS)
def test_the_target_is_the_mean_of_separate_networks(runs, batch, name):
    teacher = load_teacher(str(runs[name]), load_teacher_config(str(runs[name])))
    torch.manual_seed(5)
    seeds, probs = [int(KeySource().next(1)[0]) for _ in range(3)], []
    for seed in seeds:
        with torch.no_grad(), teacher.samples.ensemble(1, seed=seed):
            logits = teacher.network(**inputs_of(batch)).logits
        probs.append(supervised(logits, batch["labels"], shift=True)[0].double().softmax(-1))
    assert not torch.allclose(probs[0], probs[1], rtol=0.1)
    torch.manual_seed(5)
    found = distill.mean_log_probs(teacher, batch, 3)
    torch.testing.assert_close(found.double(), (sum(probs) / 3).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_the_student_starts_without_noise_and_becomes_a_plain_network(runs, batch, tmp_path, name):
    run = load_teacher_config(str(runs[name]))
    training = {"output_dir": str(tmp_path / "student"), "max_steps": 2, "learning_rate": 1e-2, "use_cpu": True}
    config = DistillConfig(teacher=str(runs[name]), training=training, num_samples=2, compare_samples=[2])
    teacher = load_teacher(str(runs[name]), run)
    student = distill.make_student(teacher, config, run)
    with torch.no_grad():
        before = student(**inputs_of(batch)).logits
        torch.testing.assert_close(before, teacher.network(**inputs_of(batch)).logits)
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in student.named_parameters() if run.weights == "full" or "lora_" in name}

    distill.distil(config, run)
    scores, of_run = read_results(tmp_path / "student")["scores"], read_results(runs[name])
    assert scores["noise_off"]["all"]["nll"] == pytest.approx(of_run["metrics"]["eval_nll"], rel=1e-4)
    assert scores["ensemble_2"]["all"]["nll"] == pytest.approx(of_run["ensemble_metrics"]["eval_nll"], rel=1e-4)
    assert not list((tmp_path / "student").glob("regularizer*"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert not torch.allclose(plain(**inputs_of(batch)).logits, before, rtol=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_the_ensemble_answers_more_questions(runs, tmp_path, name):
    run = load_teacher_config(str(runs[name]))
    teacher, tokenizer = load_teacher(str(runs[name]), run), load_tokenizer(run)
    write_jsonl(tmp_path / "prompts.jsonl", [{"question": "3 + 3?"}, {"question": "12 + 12?"}])
    training = {"output_dir": str(tmp_path / "student"), "use_cpu": True}
    settings = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 4, "num_samples": 2}
    rows = distill.answer_prompts(teacher, tokenizer, DistillConfig(teacher="", training=training, **settings))
    assert len(rows) == 2
    for row in rows:
        prompt_length = row["labels"].count(-100)
        with torch.no_grad(), teacher.samples.ensemble(2):
            mean = teacher.network(input_ids=torch.tensor([row["input_ids"]])).logits[0, prompt_length - 1 : -1]
        assert mean.argmax(-1).tolist() == row["labels"][prompt_length:]


def test_a_method_that_a_plain_student_cannot_hold_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs["BLoB"], tmp_path / "teacher")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"dip": {"init_noise_std": 0.1}, "regularizer": {"name": "normality"}, "evaluation": {"tasks": []}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="trained with NormalityNormalization, which a plain student cannot hold"):
        load_teacher_config(str(folder))
