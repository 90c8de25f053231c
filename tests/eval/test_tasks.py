"""The tasks of `eval/tasks/` against upstream's, their filters on frozen answers, `score` from end to end."""

from decimal import Decimal
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from dipnet_hf.answers import Answer, WritingLM
from eval.scoring import AnswerCheck, score
from eval.task_files import TASKS, resolve_tasks
from eval.tasks.svamp.utils import parse_number
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits
from tests.helpers import write_jsonl

UPSTREAM = Path(lm_eval.tasks.__file__).parent
NAMES = [
    "gsm8k_local",
    "gsm8k_local_fewshot",
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
        write_jsonl(path, problems)
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


def load_task(name, **files):
    """Build a task over files, with the seed that the harness gives to the choice of shots."""
    return load_spec(resolve_tasks([name], {name: files})[0])


def load_spec(spec):
    (task,) = TaskManager(include_defaults=False).load([spec])["tasks"].values()
    task.set_fewshot_seed(1234)
    return task


def prompts(task):
    task.build_all_requests(limit=3)
    return [request.args[0] for request in task.instances]


def test_each_task_has_a_version_and_is_greedy_and_there_is_one_for_every_test_split():
    configs = task_configs()
    assert sorted(configs) == sorted([*NAMES, "aqua_rat_local", "gsm8k_cot_local", "svamp"])
    assert all(config["metadata"]["version"] == 1.0 for config in configs.values())
    generation = [config["generation_kwargs"] for name, config in configs.items() if name != "aqua_rat_local"]
    assert all(kwargs["do_sample"] is False for kwargs in generation)


@pytest.mark.parametrize("name", [*NAMES, "gsm8k_cot_local"])
def test_prompt_target_metric_and_filters_are_those_of_upstream(name):
    file = "gsm8k-cot.yaml" if name == "gsm8k_cot_local" else "gsm8k.yaml"
    upstream = yaml.safe_load((UPSTREAM / "gsm8k" / file).read_text())
    ours = task_configs()[name]
    same = ["doc_to_text", "doc_to_target", "metric_list", "filter_list", "output_type", "repeats"]
    same += ["generation_kwargs"] * name.startswith("gsm8k")
    same += ["fewshot_split", "num_fewshot"] * (name == "gsm8k_local_fewshot")
    same += ["num_fewshot"] * (name == "gsm8k_cot_local")
    assert {key: ours[key] for key in same} == {key: upstream[key] for key in same}
    assert upstream["doc_to_text"].split("{")[0].strip() in ours["generation_kwargs"]["until"]


@pytest.mark.parametrize(
    "name, file, shots",
    [("gsm8k_local", "gsm8k", 0), ("gsm8k_local_fewshot", "gsm8k", 5), ("gsm8k_cot_local", "gsm8k-cot", 8)],
)
def test_whole_prompts_are_those_of_upstream(write_problems, name, file, shots):
    rows = [{"question": f"q{i}", "answer": f"a{i}\n#### {i}"} for i in range(40)]
    files = {"train": write_problems(rows[3:], "train.jsonl"), "test": write_problems(rows[:3])}
    upstream = yaml.safe_load((UPSTREAM / "gsm8k" / f"{file}.yaml").read_text())
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    ours = prompts(load_task(name, **files))
    assert ours == prompts(load_spec({**upstream, **local, "num_fewshot": shots}))
    assert all(prompt.count("Question:") + prompt.count("Q:") == shots + 1 for prompt in ours)


def test_paths_can_come_from_a_file_that_includes_the_task(write_problems, tmp_path):
    path = write_problems([{"Body": "He has 2.", "Question": "How many?", "Answer": 2.0}])
    config = {"include": str(TASKS / "svamp" / "svamp.yaml"), "task": "mine"}
    config["dataset_kwargs"] = {"data_files": {"test": path}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    task = TaskManager(include_path=str(tmp_path), include_defaults=False).load("mine")["tasks"]["mine"]
    assert prompts(task) == ["Question: He has 2. How many?\nAnswer:"]
    assert task.process_results(task.eval_docs[0], ["2"]) == {"exact_match": 1.0}


class FrozenAnswers(LM):
    """A model that answers each prompt from a table, and rates each continuation by another."""

    def __init__(self, answers=(), likelihoods=()):
        super().__init__()
        self.answers = dict(answers)
        self.likelihoods = dict(likelihoods)

    def generate_until(self, requests, disable_tqdm=False):
        return [self.answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(self.likelihoods[request.args[1]], False) for request in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def evaluate_answers(task, answers):
    """Return what each filter makes of the answers: filter to scores, in the order of the problems."""
    lm = FrozenAnswers(answers)
    samples = evaluate(lm, {"tasks": {task.task_name: task}}, bootstrap_iters=0)["samples"][task.task_name]
    return {
        name: [int(sample["exact_match"]) for sample in samples if sample["filter"] == name]
        for name in ("strict-match", "flexible-extract")
    }


# What upstream's gsm8k makes of an answer: (gold, answer, strict match, flexible match). Texts are compared.
FROZEN = [
    ("18", "9*2=<<9*2=18>>18\n#### 18", 1, 1),
    ("18", "#### 17", 0, 0),
    # commas
    ("1234", "#### 1,234", 1, 1),
    ("1,234", "#### 1234", 1, 1),
    # signs
    ("-5", "#### -5", 1, 1),
    ("5", "#### -5", 0, 0),
    ("5", "#### +5", 0, 1),
    ("8", "12-8", 0, 0),
    ("-8", "12-8", 0, 1),
    # decimals
    ("2.5", "#### 2.5", 1, 1),
    ("2.5", "#### 2.50", 0, 0),
    ("18", "#### 18.0", 0, 0),
    ("18", "#### 18.", 1, 1),
    # units
    ("18", "#### 18 apples", 1, 1),
    ("18", "#### $18", 0, 1),
    ("-5", "#### -$5", 0, 1),
    ("18", "#### 18%", 1, 1),
    # LaTeX
    ("18", "\\boxed{18}", 0, 1),
    ("1234", "$\\boxed{1,234}$", 0, 1),
    ("18", "#### \\boxed{18}", 0, 1),
    ("18", "It is $\\boxed{18}$.", 0, 0),  # the last number is taken to be `$.`
    # no answer in the form asked for, or none at all
    ("18", "The answer is 18", 0, 1),
    ("18", "####18", 0, 1),
    ("18", "I do not know", 0, 0),
    ("18", "####", 0, 0),
    ("18", "", 0, 0),
    # two answers
    ("18", "#### 18\n#### 20", 1, 0),
    ("20", "#### 18\n#### 20", 0, 1),
    ("18", "He has 18 ...", 0, 0),
    # digits and signs outside ASCII: Arabic-Indic, full-width, minus
    ("18", "#### ١٨", 0, 0),
    ("18", "#### １８", 0, 0),
    ("-5", "#### −5", 0, 0),
    ("5", "#### −5", 0, 1),
]
# The same for upstream's gsm8k_cot, whose strict match alone differs.
FROZEN_COT = [
    ("18", "9 * 2 = 18. The answer is 18.", 1, 1),
    ("18", "The answer is 17.", 0, 0),
    ("1234", "The answer is 1,234.", 1, 1),
    ("-5", "The answer is -5.", 1, 1),
    ("5", "The answer is +5.", 0, 1),
    ("2.5", "The answer is 2.5.", 1, 1),
    ("2.5", "The answer is 2.50.", 0, 0),
    ("18", "The answer is 18.0.", 0, 0),
    ("18", "The answer is 18 apples.", 1, 1),
    ("18", "The answer is 18%.", 1, 1),
    ("18", "The answer is $18.", 0, 1),
    ("1234", "The answer is \\boxed{1,234}.", 0, 1),
    ("1234", "The answer is $\\boxed{1,234}$.", 0, 0),  # the last number is taken to be `$.`
    ("18", "The answer is 18", 0, 1),
    ("1", "The answer is 18", 1, 0),  # one more character is asked for: the 8
    ("18", "#### 18", 0, 1),
    ("18", "I do not know", 0, 0),
    ("18", "", 0, 0),
    ("18", "The answer is 18. The answer is 20.", 1, 0),
    ("18", "The answer is ١٨.", 0, 0),
    ("18", "The answer is １８.", 0, 0),
    ("-5", "The answer is −5.", 0, 0),
]
# The same for svamp, which compares numbers.
FROZEN_SVAMP = [
    (18.0, "9*2=<<9*2=18>>18\n#### 18", 1, 1),
    (18.0, "#### 17", 0, 0),
    (8.0, "#### 8", 1, 1),
    (8, "#### 8.00", 1, 1),
    (1234.0, "#### 1,234", 1, 1),
    (22090603.0, "#### 22,090,603", 1, 1),
    (20.0, "#### 18,20", 0, 1),
    (-5.0, "#### -5", 1, 1),
    (5.0, "#### -5", 0, 0),
    (5.0, "#### +5", 1, 1),
    (8.0, "12-8", 0, 1),
    (-8.0, "12-8", 0, 0),
    (-5.0, "It is (-5)", 0, 1),
    (2.5, "#### 2.50", 1, 1),
    (0.1, "#### 0.10", 1, 1),
    (0.5, "#### .5", 1, 1),
    (18.0, "#### 18.", 1, 1),
    (18.0, "#### 18 apples", 1, 1),
    (18.0, "#### $18", 1, 1),
    (-5.0, "#### -$5", 1, 1),
    (-5.0, "#### $-5", 1, 1),
    (18.0, "#### 18%", 1, 1),
    (12.0, "#### 12 m²", 1, 1),
    (18.0, "\\boxed{18}", 0, 1),
    (1234.0, "$\\boxed{1,234}$", 0, 1),
    (18.0, "#### \\boxed{18}", 0, 1),
    (18.0, "The answer is 18.", 0, 1),
    (18.0, "####18", 1, 1),
    (18.0, "I do not know", 0, 0),
    (18.0, "####", 0, 0),
    (18.0, "", 0, 0),
    (18.0, "#### 18\n#### 20", 1, 0),
    (20.0, "#### 18\n#### 20", 0, 1),
    (18.0, "He has 18 ...", 0, 1),
    (36.0, "#### 36/2", 1, 0),  # what follows the number is not looked at
    (18.0, "#### ١٨", 1, 1),
    (18.0, "#### １８", 1, 1),
    (1234.5, "#### １，２３４．５", 1, 1),
    (-5.0, "#### −5", 1, 1),
    (5.0, "#### −5", 0, 0),
]


@pytest.mark.parametrize(
    "name, rows",
    [("gsm8k_local", FROZEN), ("gsm8k_local_fewshot", FROZEN), ("word_problems", FROZEN)]
    + [("gsm8k_cot_local", FROZEN_COT), ("svamp", FROZEN_SVAMP)],
)
def test_filters_on_frozen_answers(write_problems, name, rows):
    if name == "svamp":
        problems = [{"Body": "It is.", "Question": str(i), "Answer": row[0]} for i, row in enumerate(rows)]
    else:
        problems = [{"question": str(i), "answer": f"So it is.\n#### {row[0]}"} for i, row in enumerate(rows)]
    task = load_task(name, test=write_problems(problems), train=write_problems(problems, "train.jsonl"))
    task.set_config("num_fewshot", 0)
    asked = [task.doc_to_text(doc) for doc in task.eval_docs]
    matches = evaluate_answers(task, {prompt: row[1] for prompt, row in zip(asked, rows)})
    assert matches["strict-match"] == [row[2] for row in rows]
    assert matches["flexible-extract"] == [row[3] for row in rows]


@pytest.mark.parametrize("name, rows", [("gsm8k_local", FROZEN), ("gsm8k_cot_local", FROZEN_COT)])
def test_an_answer_by_itself_is_checked_as_in_a_scoring(name, rows):
    for filter_name, place in (("strict-match", 2), ("flexible-extract", 3)):
        check = AnswerCheck(name, filter_name)
        assert [check(row[1], f"So it is.\n#### {row[0]}") for row in rows] == [bool(row[place]) for row in rows]
    assert "</s>" in check.stop_strings


@pytest.mark.parametrize(
    "name, filter_name, message",
    [
        ("gsm9k", "strict-match", "No task called gsm9k"),
        ("gsm8k_local", "strict", "gsm8k_local has no filter 'strict'; it has strict-match, flexible-extract"),
        (
            "svamp",
            "strict-match",
            "svamp does not compare a written answer with the one of a question and answer: take",
        ),
        ("aqua_rat_local", "none", "aqua_rat_local does not compare a written answer"),
    ],
)
def test_what_does_not_check_answers_is_refused(name, filter_name, message):
    with pytest.raises(ValueError, match=message):
        AnswerCheck(name, filter_name)


@pytest.mark.parametrize(
    "text, number",
    [("18", "18"), ("1,234.50", "1234.5"), ("-$5", "-5"), ("−5", "-5"), ("１８", "18"), ("١٨", "18"), (".5", "0.5")]
    + [("[invalid]", None), ("", None), ("-", None)],
)
def test_a_number_is_read_from_what_a_filter_picks(text, number):
    assert parse_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("gold", [8, 8.0, "8", "8.0", "8.00"])
def test_svamps_target_is_its_answer_in_gsm8ks_form(write_problems, gold):
    task = load_task("svamp", test=write_problems([{"Body": "a", "Question": "b?", "Answer": gold}]))
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == "Question: a b?\nAnswer:"
    assert task.process_results(doc, ["8"]) == task.process_results(doc, ["8.000"]) == {"exact_match": 1.0}
    if not isinstance(gold, str):
        assert task.doc_to_target(doc) == "#### 8"


def test_options_are_ranked_by_likelihood(write_problems):
    upstream = load_yaml(UPSTREAM / "agieval" / "aqua-rat.yaml", resolve_func=False)
    ours = task_configs()["aqua_rat_local"]
    assert {key: ours[key] for key in ("output_type", "metric_list")} == {
        key: upstream[key] for key in ("output_type", "metric_list")
    }
    options = ["A)1", "B)22222222", "C)3", "D)4", "E)4"]
    rows = [{"question": "How many?", "options": options, "rationale": "", "correct": letter} for letter in "ABDE"]
    task = load_task("aqua_rat_local", test=write_problems(rows))
    assert prompts(task)[0] == "Question: How many?\nOptions:\nA)1\nB)22222222\nC)3\nD)4\nE)4\nAnswer:"
    # A is the likeliest, B the likeliest per character; D and E are alike but for their letter.
    lm = FrozenAnswers(likelihoods=zip((f" {option}" for option in options), (-3.0, -5.0, -6.0, -6.0, -7.0)))
    samples = evaluate(lm, {"tasks": {"aqua_rat_local": task}}, bootstrap_iters=0)["samples"]["aqua_rat_local"]
    assert [sample["target"] for sample in samples] == [0, 1, 3, 4]
    assert [(sample["acc"], sample["acc_norm"]) for sample in samples] == [(1, 0), (0, 1), (0, 0), (0, 0)]


def test_on_the_real_files_the_right_answer_counts(shared):
    data = shared / "data"
    svamp = load_task("svamp", test=data / "svamp" / "SVAMP.json")
    answers = {svamp.doc_to_text(doc): svamp.doc_to_target(doc) for doc in svamp.eval_docs}
    assert len(answers) == 1000
    assert evaluate_answers(svamp, answers) == {"strict-match": [1] * 1000, "flexible-extract": [1] * 1000}
    aqua = load_task("aqua_rat_local", test=data / "aqua-rat" / "test.json")
    targets = [(doc["options"][aqua.doc_to_target(doc)][:2], f"{doc['correct']})") for doc in aqua.eval_docs]
    assert len(targets) == 254 and all(chosen == correct for chosen, correct in targets)


@pytest.mark.parametrize("wrapped", [False, True], ids=["transformers", "peft"])
def test_scoring_from_end_to_end_leaves_no_trace(model, tokenizer, problems, write_problems, wrapped):
    if wrapped:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    state = torch.get_rng_state()
    path = write_problems(problems)
    tasks = dict.fromkeys(["gsm8k_local", "word_problems"], path)
    scores = score(model, tokenizer, tasks, limit=4, batch_size=2, max_new_tokens=4)
    assert list(scores) == list(tasks)
    for numbers in scores.values():
        assert numbers.pop("n") == 4
        filters = ("strict-match", "flexible-extract")
        for name in filters:
            correct, confidence = numbers.pop(f"correct,{name}"), numbers.pop(f"confidence,{name}")
            assert len(correct) == len(confidence) == 4 and set(correct) <= {0, 1}
            assert sum(correct) / 4 == numbers[f"exact_match,{name}"]
        figures = ("exact_match", "exact_match_stderr", "ece", "brier", "aurc")  # and auroc, if not all are wrong
        assert set(numbers) == {f"{figure},{name}" for figure in figures for name in filters}
        assert all(type(value) is float for value in numbers.values())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_right_answer_counts(model, tokenizer, write_problems, monkeypatch):
    answer = Answer("#### 1", prompt=[3], tokens=[4, 5])
    monkeypatch.setattr(WritingLM, "generate_until", lambda self, requests: [answer] * len(requests))
    path = write_problems([{"question": "a", "answer": "#### 1"}, {"question": "b", "answer": "#### 2"}])
    scores = score(model, tokenizer, {"word_problems": path})["word_problems"]
    assert scores["exact_match,strict-match"] == scores["exact_match,flexible-extract"] == 0.5
    assert scores["exact_match_stderr,strict-match"] == pytest.approx(0.5)  # sqrt(0.5 * 0.5 * 2 / (2 - 1) / 2)
    write_problems([{"question": "a", "answer": "#### 1"}])  # the same path, read anew
    assert score(model, tokenizer, {"word_problems": path})["word_problems"]["exact_match,strict-match"] == 1


def test_options_are_scored_without_generation(model, tokenizer, write_problems):
    path = write_problems([{"question": "a", "options": ["A)1", "B)2"], "correct": "B"}])
    numbers = score(model, tokenizer, {"aqua_rat_local": path})["aqua_rat_local"]
    assert numbers["acc,none"] in (0, 1) and numbers["acc_norm,none"] in (0, 1) and numbers["n"] == 1


def test_what_cannot_be_scored_is_refused_before_any_work(write_problems, tmp_path):
    path = write_problems([{"question": "a", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="No task called gsm9k; eval/tasks/ has aqua_rat_local, gsm8k_cot_local"):
        score(None, None, {"gsm9k": path})
    with pytest.raises(ValueError, match="No data file at .*nowhere.jsonl"):
        score(None, None, {"word_problems": path, "gsm8k_local": str(tmp_path / "nowhere.jsonl")})
    (tmp_path / "broken.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b"\n')
    with pytest.raises(ValueError, match="broken.jsonl, line 2 is not valid JSON"):
        score(None, None, {"word_problems": str(tmp_path / "broken.jsonl")})
    with pytest.raises(ValueError, match="gsm8k_local_fewshot reads a file for test and one for train"):
        score(None, None, {"gsm8k_local_fewshot": path})
