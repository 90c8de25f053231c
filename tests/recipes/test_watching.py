"""What watches a training: the problems of every format, and the recipe from its configuration to what it logs."""

import shutil

import pytest
import yaml
from datasets import Dataset, DatasetDict
from transformers import EarlyStoppingCallback, TrainerState

from dipnet_hf import GenerationCallback
from recipes import finetune
from recipes.data import PreparedData
from recipes.running import was_stopped
from recipes.tokens import Chat
from recipes.watching import split_last_answer, watched_problems
from tests.helpers import read_results, write_jsonl

ASK, REPLY = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "So\n#### 2"}
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_the_last_answer_is_the_last_run_of_labels():
    assert split_last_answer([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100]) == ([1, 2, 3], [4, 5])
    assert split_last_answer([1, 2], [1, 2]) == ([], [1, 2])


@pytest.mark.parametrize(
    "row, chat, prompt",
    [
        ({"question": "1 + 1?", "answer": "So\n#### 2"}, None, "Question: 1 + 1?\nAnswer:"),
        ({"question": "1 + 1?", "answer": "So\n#### 2"}, Chat(), PROMPT.format("Question: 1 + 1?\nAnswer:")),
        ({"prompt": "1 + 1?", "completion": " So\n#### 2"}, None, "1 + 1?"),
        ({"prompt": [ASK], "completion": [REPLY]}, Chat(), PROMPT.format("1 + 1?")),
        ({"messages": [ASK, REPLY]}, Chat(), PROMPT.format("1 + 1?")),
        (
            {"messages": [ASK, REPLY, ASK, REPLY]},
            Chat(),
            f"{PROMPT.format('1 + 1?')}So\n#### 2<|im_end|>\n{PROMPT.format('1 + 1?')}",
        ),
        ({"text": "So\n#### 2"}, None, ""),
    ],
    ids=["question", "question in a chat", "prompt", "turns", "messages", "more messages", "text"],
)
def test_problems_of_every_format(chat_tokenizer, row, chat, prompt):
    rows = DatasetDict({"train": Dataset.from_list([row]), "test": Dataset.from_list([row] * 3)})
    data = PreparedData([rows, rows], None, None, None, {}, chat)
    problems = watched_problems(2, chat_tokenizer, data)
    assert len(problems) == 2 and len(watched_problems(9, chat_tokenizer, data)) == 6
    for asked, answer in problems:
        assert chat_tokenizer.decode(asked) == prompt
        assert chat_tokenizer.decode(answer, skip_special_tokens=True).strip() == "So\n#### 2"


def test_problems_are_those_of_validation_where_there_are_some(tokenizer):
    parts = {name: Dataset.from_list([{"prompt": name, "completion": "#### 1"}]) for name in ("validation", "test")}
    data = PreparedData([DatasetDict(parts)], None, parts["validation"], parts["test"], {}, None)
    assert [tokenizer.decode(prompt) for prompt, _ in watched_problems(5, tokenizer, data)] == ["validation"]


@pytest.fixture
def run(model_folder, problems_folder, tmp_path):
    """Return a function that runs the recipe with evaluations on the way, and returns its output folder."""

    def run_recipe(*overrides, name="run", max_steps=6, **training):
        config = {
            "model": str(model_folder),
            "dataset": str(problems_folder),
            "max_length": 64,
            "weights": "full",
            "dip": {"init_noise_std": 0.1},
            "training": {
                "output_dir": str(tmp_path / name),
                **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 0},
                **{"use_cpu": True, "logging_steps": 1, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
                **training,
            },
            "evaluation": {"tasks": [], "max_new_tokens": 12, "while_training": {"num_problems": 3}},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        finetune.main([str(path), "--set", f"training.max_steps={max_steps}", *overrides])
        return tmp_path / name

    return run_recipe


def on_the_way(folder, name="eval_exact_match"):
    """What a run has logged, by step."""
    return {entry["step"]: entry[name] for entry in read_results(folder)["log_history"] if name in entry}


def test_the_last_figure_is_that_of_the_scoring(run, problems_folder, capsys):
    lines = (problems_folder / "train.jsonl").read_text().splitlines(keepends=True)
    test = (problems_folder / "test.jsonl").read_text().splitlines(keepends=True)
    (problems_folder / "train.jsonl").write_text("".join(lines[:4]))
    (problems_folder / "test.jsonl").write_text("".join([*lines[:4], *test]))
    folder = run(
        *("evaluation.tasks=[gsm8k_local]", "evaluation.while_training.num_problems=9", "dip=null"),
        **{"max_steps": 120, "eval_steps": 60, "save_strategy": "no", "per_device_train_batch_size": 4},
    )
    scored = read_results(folder)["scores"]["gsm8k_local"]
    assert 0 < scored["exact_match,strict-match"] < 1 and scored["n"] == 9
    assert on_the_way(folder)[120] == pytest.approx(scored["exact_match,strict-match"])
    assert sorted(on_the_way(folder)) == sorted(on_the_way(folder, "eval_nll")) == [60, 120]
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "losses.png" in capsys.readouterr().out


@pytest.fixture
def figures(monkeypatch):
    """Let the evaluation after each step find a figure that is given."""
    monkeypatch.setattr(GenerationCallback, "exact_match", lambda self: FIGURES[self._trainer.state.global_step - 1])


FIGURES = [0.2, 0.6, 0.4, 0.5, 0.9, 0.9]
STOPPING = (
    "evaluation.early_stopping_patience=2",
    "validation_fraction=0.3",
    "evaluation.while_training.num_problems=1",
)


def test_a_run_is_stopped_early_and_resumed_to_the_same_end(run, figures, tmp_path):
    settings = {"metric_for_best_model": "exact_match"}
    whole = run(*STOPPING, name="whole", **settings)
    assert on_the_way(whole) == dict(enumerate(FIGURES[:4], start=1))
    assert read_results(whole)["metrics"]["num_steps"] == 4
    assert read_results(whole)["best_checkpoint"]["step"] == 2
    for step in (3, 4):  # amid the evaluations that were no better, and after the last of them
        name = f"resumed-{step}"
        for checkpoint in range(1, step + 1):
            shutil.copytree(whole / f"checkpoint-{checkpoint}", tmp_path / name / f"checkpoint-{checkpoint}")
        resumed = run(*STOPPING, name=name, **settings)
        assert read_results(resumed)["metrics"] == read_results(whole)["metrics"]
        assert on_the_way(resumed) == on_the_way(whole)


def test_the_best_model_is_loaded_at_the_end_also_of_a_resumed_run(run, figures, tmp_path):
    settings = {"metric_for_best_model": "exact_match", "load_best_model_at_end": True}
    whole = run(*STOPPING, name="whole", **settings)
    for step in range(1, 5):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    for folder in (whole, run(*STOPPING, name="resumed", **settings)):
        weights = "adapter_model.safetensors"
        assert (folder / weights).read_bytes() == (folder / "checkpoint-2" / weights).read_bytes()


def test_a_run_that_was_interrupted_was_not_stopped_early():
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    control = {"TrainerControl": {"args": {"should_training_stop": True}, "attributes": {}}}  # a preempted job's
    for counter, expected in ((1, False), (2, True)):
        stopping.early_stopping_patience_counter = counter
        state = TrainerState(stateful_callbacks=control | {"EarlyStoppingCallback": stopping.state()})
        assert was_stopped(state) == expected
    assert not was_stopped(TrainerState(stateful_callbacks=control))


def test_nothing_watches_after_the_training(run, monkeypatch):
    trainers = []
    monkeypatch.setattr(finetune, "save_model", lambda trainer, folder: trainers.append(trainer))
    monkeypatch.setattr(finetune, "noise_table", lambda *_: None)
    run(*STOPPING, metric_for_best_model="nll", max_steps=1)
    left = (GenerationCallback, EarlyStoppingCallback)
    assert not [call for call in trainers[0].callback_handler.callbacks if isinstance(call, left)]


def test_rows_without_an_answer_to_check_are_refused_before_training(run, problems_folder):
    write_jsonl(problems_folder / "test.jsonl", [{"question": "1 + 1?", "answer": "It is two."}])
    with pytest.raises(ValueError, match="Held-out problem 1 has no answer that can be checked: .*'It is two.'"):
        run()
    for split in ("train", "test"):
        write_jsonl(problems_folder / f"{split}.jsonl", [{"text": "It is\n#### 2"}])
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        run()
