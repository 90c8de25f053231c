"""The tasks of `eval/tasks/` against upstream's gsm8k, their filters on frozen answers, `score` from end to end."""

import json
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from eval.scoring import TASKS, score
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits

NAMES = [
    "gsm8k_local",
    "word_problems",
    "word_problems_larger_numbers",
    "word_problems_more_steps",
    "word_problems_unseen_templates",
]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write_problems(tmp_path):
    """Return a function that writes problems as JSON Lines and returns the path."""

    def write(problems, name="problems.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        return str(path)

    return write


@pytest.fixture(scope="module")
def problems():
    return generate_splits(0, {"test": 8})["test"]


@pytest.fixture(scope="module")
def tokenizer(problems):
    return train_tokenizer([problem["question"] for problem in problems])


@pytest.fixture
def model(tokenizer):
    set_seed(0)
    return tiny_llama(tokenizer)


def task_configs():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return {name: manager.task_index[name].cfg for name in manager.all_tasks}


def test_there_is_a_task_for_gsm8k_and_one_for_every_test_split():
    assert sorted(task_configs()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_prompt_target_metric_and_filters_are_those_of_upstream(name):
    upstream = yaml.safe_load((Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text())
    ours = task_configs()[name]
    same = ["doc_to_text", "doc_to_target", "metric_list", "filter_list", "output_type", "repeats"]
    same += ["generation_kwargs"] * (name == "gsm8k_local")
    assert {key: ours[key] for key in same} == {key: upstream[key] for key in same}
    assert ours["generation_kwargs"]["do_sample"] is False and "Question:" in ours["generation_kwargs"]["until"]
    assert ours["metadata"]["version"] == 1.0


class FrozenAnswers(LM):
    """A model that answers each prompt from a table."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


# What the harness makes of an answer: (gold, answer, strict match, flexible match).
FROZEN = [
    ("18", "9*2=<<9*2=18>>18\n#### 18", 1, 1),
    ("18", "#### 17", 0, 0),
    ("1234", "#### 1,234", 1, 1),
    ("1,234", "#### 1234", 1, 1),
    ("-5", "#### -5", 1, 1),
    ("5", "#### -5", 0, 0),
    ("2.5", "#### 2.5", 1, 1),
    ("18", "#### 18.0", 0, 0),
    ("18", "#### 18.", 1, 1),
    ("18", "#### 18 apples", 1, 1),
    ("18", "#### $18", 0, 1),
    ("18", "The answer is 18", 0, 1),
    ("18", "I do not know", 0, 0),
    ("18", "", 0, 0),
    ("18", "#### 18\n#### 20", 1, 0),
    ("20", "#### 18\n#### 20", 0, 1),
]


@pytest.mark.parametrize("name", ["gsm8k_local", "word_problems"])
def test_filters_on_frozen_answers(write_problems, name):
    path = write_problems({"question": str(i), "answer": f"So it is.\n#### {row[0]}"} for i, row in enumerate(FROZEN))
    task = {**task_configs()[name], "dataset_kwargs": {"data_files": {"test": path}}, "num_fewshot": 0}
    lm = FrozenAnswers({f"Question: {i}\nAnswer:": row[1] for i, row in enumerate(FROZEN)})
    samples = evaluate(lm, TaskManager(include_defaults=False).load([task]))["samples"][name]
    matches = {(sample["filter"], sample["doc_id"]): sample["exact_match"] for sample in samples}
    assert [matches["strict-match", i] for i in range(len(FROZEN))] == [row[2] for row in FROZEN]
    assert [matches["flexible-extract", i] for i in range(len(FROZEN))] == [row[3] for row in FROZEN]


@pytest.mark.parametrize("wrapped", [False, True], ids=["transformers", "peft"])
def test_scoring_from_end_to_end_leaves_no_trace(model, tokenizer, problems, write_problems, wrapped):
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    state = torch.get_rng_state()
    path = write_problems(problems)
    scores = score(model, tokenizer, dict.fromkeys(NAMES[:2], path), limit=4, batch_size=2, max_new_tokens=4)
    assert list(scores) == NAMES[:2]
    for numbers in scores.values():
        assert numbers.pop("n") == 4
        filters = ("strict-match", "flexible-extract")
        assert set(numbers) == {
            f"{metric},{name}" for metric in ("exact_match", "exact_match_stderr") for name in filters
        }
        assert all(type(value) is float for value in numbers.values())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_right_answer_counts(model, tokenizer, write_problems, monkeypatch):
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.generate_until", lambda self, requests: ["#### 1"] * len(requests)
    )
    path = write_problems([{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "#### 2"}])
    scores = score(model, tokenizer, {"word_problems": path})["word_problems"]
    assert scores["exact_match,strict-match"] == scores["exact_match,flexible-extract"] == 0.5
    assert scores["exact_match_stderr,strict-match"] == pytest.approx(0.5)  # sqrt(0.5 * 0.5 * 2 / (2 - 1) / 2)
    write_problems([{"question": "a", "answer": "#### 1"}])  # the same path, read anew
    assert score(model, tokenizer, {"word_problems": path})["word_problems"]["exact_match,strict-match"] == 1


def test_what_cannot_be_scored_is_refused_before_any_work(write_problems, tmp_path):
    path = write_problems([{"question": "a", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="No task called gsm9k; eval/tasks/ has gsm8k_local, word_problems"):
        score(None, None, {"gsm9k": path})
    with pytest.raises(ValueError, match="No data file at .*nowhere.jsonl"):
        score(None, None, {"word_problems": path, "gsm8k_local": str(tmp_path / "nowhere.jsonl")})
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b"\n')
    with pytest.raises(ValueError, match="broken.jsonl, line 2 is not valid JSON"):
        score(None, None, {"word_problems": str(tmp_path / "broken.jsonl")})
