"""`eval/run.py` from end to end on tiny models: its modes, its calibration figures, resume, two processes, errors."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.filters.selection import MajorityVoteFilter
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from dipnet_hf import DipConfig, get_dip_model
from dipnet_hf.answers import Answer
from dipnet_hf.lm_eval_model import DipLM
from eval.calibration import FIGURES, MajorityVoteOfFound, calibration, confidences
from eval.run import load_tasks, main, set_repeats
from eval.scoring import score
from recipes.tiny_model import tiny_llama, train_tokenizer
from recipes.word_problems import generate_splits
from tests.helpers import run_in_processes, write_jsonl

PROBLEMS = generate_splits(0, {"test": 5})["test"]
OPTIONS = [f"{letter}){number}" for letter, number in zip("ABC", (1, 25, 3333))]
MODES = {
    "noise-off": [],
    "ensemble": ["num_samples=2"],
    "vote": ["num_samples=3,average=vote"],
    "temperature": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter, and the files of two tasks."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer([problem["question"] for problem in PROBLEMS])
    set_seed(0)
    model = tiny_llama(tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    batch = tokenizer([problem["question"] for problem in PROBLEMS], return_tensors="pt", padding=True)
    weights = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_dip_model(model, DipConfig(weights=weights, init_noise_std=0.3), calibration=[batch])
    model.save_pretrained(folder / "adapter")
    write_jsonl(folder / "words.jsonl", PROBLEMS)
    rows = [
        {"question": problem["question"], "options": OPTIONS, "correct": "ABC"[number % 3]}
        for number, problem in enumerate(PROBLEMS)
    ]
    write_jsonl(folder / "aqua.json", rows)
    return folder


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the home folder, and spare the seconds that describing the machine takes."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def command(folder, output, *more, model_args=(), tasks="word_problems,aqua_rat_local"):
    return [
        "--model-args",
        f"pretrained={folder}/base,peft={folder}/adapter",
        *model_args,
        f"--tasks={tasks}",
        "--data",
        f"word_problems={folder}/words.jsonl",
        f"aqua_rat_local={folder}/aqua.json",
        "--gen_kwargs=max_gen_toks=6",
        "--batch_size=2",
        "--log_samples",
        "--output",
        str(output),
        *more,
    ]


def read_output(output):
    """Read the results, and the samples by task."""
    (results,) = output.glob("*/results_*.json")
    samples = {
        name: [json.loads(line) for line in next(output.glob(f"*/samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in ("word_problems", "aqua_rat_local")
    }
    return json.loads(results.read_text()), samples


@pytest.fixture(scope="module")
def outputs(folder, tmp_path_factory):
    """The output of each mode."""
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        for mode, model_args in MODES.items():
            outputs[mode] = tmp_path_factory.mktemp(mode)
            more = ["--repeats=3", "--gen_kwargs", "do_sample=True,temperature=1.0"] if mode == "temperature" else []
            main(command(folder, outputs[mode], *more, model_args=model_args))
    return outputs


@pytest.fixture(scope="module")
def model(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(base, folder / "adapter").eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "base")


# ---- the modes ----


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_results_samples_and_provenance(outputs, folder, mode):
    results, samples = read_output(outputs[mode])
    assert results["n-samples"]["word_problems"]["effective"] == len(PROBLEMS)
    assert set(results["calibration"]["word_problems"]) == {"strict-match", "flexible-extract"}
    assert set(results["calibration"]["aqua_rat_local"]) == {"none"}
    for task, by_filter in results["calibration"].items():
        metric = "acc" if task == "aqua_rat_local" else "exact_match"
        for name, figures in by_filter.items():
            assert set(figures) == set(FIGURES) and figures["n"] == len(PROBLEMS)
            assert figures["accuracy"] == pytest.approx(results["results"][task][f"{metric},{name}"])
            values = [sample["confidence"] for sample in samples[task] if sample["filter"] == name]
            assert figures["mean_confidence"] == pytest.approx(sum(values) / len(PROBLEMS))
    assert results["provenance"]["script"] == "eval/run.py"
    assert results["provenance"]["config"]["model_args"]["peft"] == f"{folder}/adapter"
    assert results["model_name"] == f"{folder}/adapter"


def test_noise_off_scores_are_those_of_scoring(outputs, folder, model, tokenizer):
    results, _ = read_output(outputs["noise-off"])
    files = {"word_problems": str(folder / "words.jsonl"), "aqua_rat_local": str(folder / "aqua.json")}
    for task, numbers in score(model, tokenizer, files, batch_size=2, max_new_tokens=6).items():
        ours = results["results"][task]
        common = set(ours) & {name for name in numbers if "," in name}
        assert len(common) >= 4 and all(ours[name] == pytest.approx(numbers[name]) for name in common)


@pytest.mark.parametrize("mode", ["vote", "temperature"])
def test_a_vote_samples_every_answer_three_times(outputs, mode):
    results, samples = read_output(outputs[mode])
    assert results["configs"]["word_problems"]["repeats"] == 3
    steps = [step["function"] for step in results["configs"]["word_problems"]["filter_list"][0]["filter"]]
    assert steps == ["regex", "majority_vote_of_found", "take_first"]
    texts = [sample["resps"][0] for sample in samples["word_problems"]]
    assert all(len(answers) == 3 for answers in texts) and any(len(set(answers)) > 1 for answers in texts)
    assert {sample["confidence"] for sample in samples["word_problems"]} <= {0.0, 1 / 3, 2 / 3, 1.0}


def test_an_ensemble_answers_otherwise_than_the_network_without_noise(outputs):
    answers = {
        mode: [
            sample["resps"]
            for task in ("word_problems", "aqua_rat_local")
            for sample in read_output(outputs[mode])[1][task]
        ]
        for mode in ("noise-off", "ensemble")
    }
    assert answers["noise-off"] != answers["ensemble"]


# ---- confidence ----


def geometric_mean(model, prompt, tokens):
    """The geometric mean probability of tokens after a prompt of tokens."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return log_probs.gather(-1, torch.tensor(tokens)[:, None]).mean().exp().item()


@pytest.mark.parametrize("mode", ["noise-off", "ensemble"])
def test_confidence_in_a_text_is_the_geometric_mean_of_its_tokens(outputs, model, tokenizer, mode):
    """Those that were written; an untrained model writes bytes that are no letters, which no text gives back."""
    lines = [json.loads(line) for line in (outputs[mode] / "responses.jsonl").read_text().splitlines()]
    written = {(*line["prompt"], line["response"]): line["tokens"] for line in lines if "tokens" in line}
    for sample in read_output(outputs[mode])[1]["word_problems"]:
        prompt, (text,) = tokenizer(sample["arguments"]["gen_args_0"]["arg_0"])["input_ids"], sample["resps"][0]
        tokens = written[(*prompt, text)]
        assert tokenizer.decode(tokens).startswith(text)
        with model.deterministic() if mode == "noise-off" else model.ensemble(2):
            expected = geometric_mean(model, prompt, tokens) if text else 0
        assert sample["confidence"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("mode", ["noise-off", "ensemble"])
def test_confidence_in_a_choice_is_its_normalized_likelihood(outputs, mode):
    for sample in read_output(outputs[mode])[1]["aqua_rat_local"]:
        likelihoods = [math.exp(float(log_likelihood)) for log_likelihood, _ in sample["filtered_resps"]]
        assert sample["confidence"] == pytest.approx(max(likelihoods) / sum(likelihoods))


def test_calibration_figures_of_known_samples():
    rows = [(0.9, 1.0), (0.8, 1.0), (0.7, 0.0), (0.2, 0.0)]
    samples = [{"filter": "f", "confidence": confidence, "acc": correct} for confidence, correct in rows]
    figures = calibration(samples, "acc")["f"]
    assert figures["n"] == 4 and figures["accuracy"] == 0.5 and figures["mean_confidence"] == pytest.approx(0.65)
    assert figures["brier"] == pytest.approx((0.1**2 + 0.2**2 + 0.7**2 + 0.2**2) / 4)
    assert figures["nll"] == pytest.approx(-math.log(0.9 * 0.8 * 0.3 * 0.8) / 4)
    assert figures["ece_width"] == pytest.approx((0.1 + 0.2 + 0.7 + 0.2) / 4)
    assert figures["auroc"] == 1 and figures["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert calibration(samples[:2], "acc")["f"]["auroc"] is None
    assert calibration([{**samples[0], "acc": 0.5}], "acc") == {}
    assert calibration(samples, "f1") == {}


@pytest.mark.parametrize(
    ("answers", "vote", "harness"),
    [
        (["18", "20", "18"], "18", "18"),
        (["20", "18"], "20", "20"),  # a tie goes to the first
        (["[invalid]", "[invalid]", "18"], "18", "[invalid]"),
        (["[invalid]", "[invalid]"], "[invalid]", "[invalid]"),
        (["20", "18", "18", "20", "20"], "18", "20"),  # only three vote
    ],
)
def test_an_answer_that_was_not_found_wins_alone(answers, vote, harness):
    assert MajorityVoteOfFound(num_votes=3).apply([answers], [{}]) == [[vote]]
    assert list(MajorityVoteFilter().apply([answers], [{}])) == [[harness]]


# ---- the command line ----


def test_a_finished_run_is_not_run_again(outputs, folder):
    with pytest.raises(ValueError, match=r"already holds a finished run \(results_.*json\). Choose another --out"):
        main(command(folder, outputs["noise-off"]))


@pytest.fixture
def batches(monkeypatch):
    """Return a list that grows with every batch, and a function that interrupts the next run after some of them."""
    done, limits = [], [None]

    def counted(name):
        stock = getattr(DipLM, name)

        def method(self, *args, **kwargs):
            if len(done) == limits[0]:
                raise KeyboardInterrupt
            done.append(name)
            return stock(self, *args, **kwargs)

        return method

    for name in ("_model_generate", "_model_call"):
        monkeypatch.setattr(DipLM, name, counted(name))

    def restart(limit=None):
        done.clear()
        limits[0] = limit

    return done, restart


@pytest.mark.parametrize("mode", ["noise-off", "ensemble", "vote"])
def test_an_interrupted_run_resumes(outputs, folder, tmp_path, batches, mode):
    done, restart = batches
    main(command(folder, tmp_path / "whole", model_args=MODES[mode]))
    num_batches = len(done)
    restart(limit=5)
    with pytest.raises(KeyboardInterrupt):
        main(command(folder, tmp_path / "parts", model_args=MODES[mode]))
    with pytest.raises(ValueError, match="another run: limit was None and is 2.0. Choose another --output_path"):
        main(command(folder, tmp_path / "parts", "--limit=2", model_args=MODES[mode]))
    restart()
    main(command(folder, tmp_path / "parts", model_args=MODES[mode]))
    assert len(done) == num_batches - 5
    (expected, expected_samples), (results, samples) = read_output(tmp_path / "whole"), read_output(tmp_path / "parts")
    assert samples == expected_samples
    for part in ("results", "calibration"):
        assert results[part] == expected[part] == read_output(outputs[mode])[0][part]


def test_another_training_into_the_same_folder_is_noticed(folder, tmp_path, batches):
    _, restart = batches
    weights = folder / "adapter" / "adapter_model.safetensors"
    restart(limit=1)
    with pytest.raises(KeyboardInterrupt):
        main(command(folder, tmp_path))
    os.utime(weights, (0, 0))
    with pytest.raises(ValueError, match="another run: files of peft was {'adapter_model.safetensors': '.* bytes of"):
        main(command(folder, tmp_path))


UNLETTERED = ["word_problems={tmp}/fine.jsonl", "aqua_rat_local={tmp}/unlettered.jsonl"]
BROKEN = '{"question": "a", "answer": "#### 1"}\n{"question": "b"\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "word_problems=./nowhere.jsonl"], "No data file at ./nowhere.jsonl"),
        (["--data", "word_problems={tmp}/broken.jsonl"], "broken.jsonl, line 2 is not valid JSON"),
        (["--data", "svamp={tmp}/broken.jsonl"], "Files for svamp, but the tasks are word_problems"),
        (["--data", "word_problems:dev=x"], "word_problems reads a file for test; test is missing, got dev"),
        (["--data", "word_problems"], "--data takes TASK=PATH or TASK:SPLIT=PATH, got word_problems"),
        (["--repeats=2"], "2 greedy answers of word_problems would be equal. Sample them with --gen_kwargs"),
        (["--repeats=0"], "--repeats must be at least 1, got 0"),
        (["-a", "num_samples=3,average=vote", "--repeats=2"], "once by each of num_samples=3, got --repeats 2"),
        (["-a", "average=vote"], "say how many with num_samples=k"),
        (["--model=hf"], "evaluates the model dip, got --model hf; use lm_eval run"),
        (["--use_cache=x"], "--use_cache is not supported: finished responses are kept"),
        (["--wandb_args", "project=x"], "--wandb_args is not supported"),
        (["--output_path={tmp}/fine.jsonl/out"], "results of ./no-such-model cannot be written to .*fine.jsonl/out"),
        (["--output_path={tmp}/broken"], "--output_path must be a folder, and .*broken is a file"),
        (["--tasks=aqua_rat_local", "--data", *UNLETTERED], "right answer of problem 2 is not among its options"),
        (["--output_path=results.json"], "--output_path must be a folder, of this run alone; got results.json"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(tmp_path, arguments, message):
    (tmp_path / "broken.jsonl").write_text(BROKEN)
    (tmp_path / "fine.jsonl").write_text(BROKEN.splitlines()[0])
    (tmp_path / "broken").write_text("a file")
    rows = [{"question": "a", "options": [f"{start}1", f"{start}2"], "correct": "A"} for start in ("A)", "(A) ")]
    write_jsonl(tmp_path / "unlettered.jsonl", rows)
    stock = ["-a", "pretrained=./no-such-model", "--tasks=word_problems", f"--output_path={tmp_path}/out"]
    data = [] if "--data" in arguments else ["--data", f"word_problems={tmp_path}/fine.jsonl"]
    with pytest.raises(ValueError, match=message):
        main([*stock, *data, *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks=svamp", "--output_path=out"], "--model_args needs pretrained="),
        (["-a", "pretrained=x", "--output_path=out"], "--tasks needs the name of a task"),
        (["-a", "pretrained=x", "--tasks=svamp"], "--output_path must be a folder, of this run alone; got None"),
    ],
)
def test_what_is_missing_is_asked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)


def test_a_folder_of_results_that_cannot_be_made_is_named_before_the_model_is_loaded(folder, tmp_path):
    arguments = command(folder, tmp_path)
    arguments[1] = "pretrained=" + "long/" * 70
    with pytest.raises(ValueError, match="cannot be written to .*: File name too long. Choose another"):
        main(arguments)


def test_names_of_tasks_may_have_spaces_and_be_patterns(folder):
    files = {name: {"test": f"{folder}/words.jsonl"} for name in ("gsm8k_local", "word_problems")}
    for names in ("word_problems, gsm8k_local", "word_problem?, gsm8k_loca?,word_problems"):
        loaded = load_tasks(EvaluatorConfig(tasks=names), files)[1]
        assert sorted(task.task_name for task in loaded) == ["gsm8k_local", "word_problems"]


def test_a_model_in_the_folder_of_today_has_results_where_others_have_them(folder, tmp_path, monkeypatch):
    """Their folder is named by the model, and `.` and `..` name others."""
    for name, start in ((".", folder / "adapter"), ("..", folder / "adapter" / "inner")):
        start.mkdir(exist_ok=True)
        monkeypatch.chdir(start)
        arguments = command(folder, tmp_path / f"out{len(name)}", "--limit=1", tasks="word_problems")
        arguments[1] = f"pretrained={folder}/base,peft={name}"
        arguments.remove(f"aqua_rat_local={folder}/aqua.json")
        main(arguments)
        (results,) = (tmp_path / f"out{len(name)}").glob("*/results_*.json")
        assert str(folder / "adapter").replace("/", "__") == results.parent.name


def test_an_interrupted_run_resumes_on_another_device(folder, tmp_path, batches):
    _, restart = batches
    restart(limit=1)
    with pytest.raises(KeyboardInterrupt):
        main(command(folder, tmp_path))
    restart()
    main(command(folder, tmp_path, "--device=cpu"))
    assert read_output(tmp_path)[0]["provenance"]["config"]["device"] == "cpu"


def test_a_task_of_ones_own_in_a_yaml_config(folder, tmp_path, monkeypatch):
    """As `lm_eval run` takes it; the index of the harness' own tasks takes seconds and is left out here."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **kwargs: TaskManager(**kwargs, include_defaults=False))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/words.jsonl"}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 4},
    }
    group = {"group": "all_mine", "task": ["mine"], "aggregate_metric_list": [{"metric": "exact_match"}]}
    config = {
        "model_args": {"pretrained": f"{folder}/base", "peft": f"{folder}/adapter", "num_samples": 2},
        "tasks": "all_mine",
        "include_path": str(tmp_path / "tasks"),
        "output_path": str(tmp_path / "out"),
        "limit": 2,
    }
    (tmp_path / "tasks").mkdir()
    for path, content in {"tasks/mine.yaml": task, "tasks/group.yaml": group, "run.yaml": config}.items():
        (tmp_path / path).write_text(yaml.safe_dump(content))
    with pytest.warns(UserWarning, match="mine takes answers as they are, so a vote compares whole texts"):
        main([f"--config={tmp_path}/run.yaml", "--repeats=2"])
    (path,) = (tmp_path / "out").glob("*/results_*.json")
    results = json.loads(path.read_text())
    assert results["groups"]["all_mine"]["exact_match,none"] == 0
    assert results["calibration"]["mine"]["none"]["n"] == 2
    assert results["configs"]["mine"]["repeats"] == 2


def load_task(folder, **changes):
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{folder}/words.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": True},
    }
    return TaskManager(include_defaults=False).load([{**config, **changes}])["tasks"]["mine"]


class Config:
    gen_kwargs: dict = {}
    model_args: dict = {}


def test_a_task_that_votes_by_itself_keeps_its_filters(folder):
    pipelines = [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {"name": "maj@2", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]},
    ]
    task = load_task(folder, repeats=2, filter_list=pipelines)
    with pytest.raises(ValueError, match="mine votes over 2 repeats of its own, got 3"):
        set_repeats(task, 3, Config)
    set_repeats(task, 2, Config)
    assert task.config.filter_list == pipelines
    task._instances = [
        Instance("generate_until", {}, ("a", {}), 0, ("mine", number, 2), resps=answers)
        for number, answers in enumerate([[Answer("x", [0], [1, 2]), "x"], [Answer("x", [0], [1]), "y"]])
    ]

    class Scorer:
        prefix_token_id = 0

        def answer_log_likelihoods(self, answers):
            assert answers == ["x", "x"]
            return [len(answer.tokens) * math.log(0.5) for answer in answers]

    assert confidences(Scorer(), task) == pytest.approx([0.5, 0.5, 1.0, 0.5])


def test_likelihoods_that_are_no_numbers_leave_the_other_results(folder, tmp_path, model):
    """A model that overflows in float16 gives NaN; the harness counts such answers as wrong."""
    for parameter in model.base_model.model.lm_head.parameters():
        parameter.data.fill_(math.nan)
    model.get_base_model().save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(tmp_path / "nan")
    arguments = command(folder, tmp_path / "out")
    arguments[1] = f"pretrained={tmp_path}/nan"
    with pytest.warns(UserWarning, match="log-likelihoods of 5 of 5 answers are not a number"):
        main(arguments)
    results, samples = read_output(tmp_path / "out")
    figures = results["calibration"]["aqua_rat_local"]["none"]
    assert figures["n"] == 5 and figures["accuracy"] == results["results"]["aqua_rat_local"]["acc,none"]
    assert figures["ece_width"] is figures["mean_confidence"] is None
    assert {sample["confidence"] for sample in samples["aqua_rat_local"]} == {None}


def test_thinking_aloud_changes_no_way_of_scoring(folder, tmp_path):
    """The harness refuses likelihoods of texts there; the tokens that were written are known."""
    arguments = command(
        folder, tmp_path, tasks="word_problems", model_args=["enable_thinking=True", "think_end_token=k"]
    )
    arguments.remove(f"aqua_rat_local={folder}/aqua.json")
    main(arguments)
    (path,) = tmp_path.glob("*/results_*.json")
    assert json.loads(path.read_text())["calibration"]["word_problems"]["strict-match"]["n"] == 5


# ---- several processes ----


def evaluate_rank(rank, folder, output):
    """What each of two processes does."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    for mode in ("ensemble", "vote"):
        main(command(folder, Path(output) / mode, model_args=MODES[mode]))


def test_two_processes_give_the_results_of_one(outputs, folder, tmp_path):
    run_in_processes(2, evaluate_rank, str(folder), str(tmp_path))
    for mode in ("ensemble", "vote"):
        (expected, expected_samples), (results, samples) = read_output(outputs[mode]), read_output(tmp_path / mode)
        assert {path.name for path in (tmp_path / mode).glob("*.jsonl")} == {"responses-1.jsonl", "responses.jsonl"}
        for task, rows in samples.items():
            order = {(row["filter"], row["doc_id"]): row for row in expected_samples[task]}
            for row in rows:
                one = order.pop((row["filter"], row["doc_id"]))
                assert row["confidence"] == pytest.approx(one["confidence"], rel=1e-4)
                if task == "word_problems":
                    # The harness pads the smaller share with one request more, whose answers it keeps.
                    assert row["resps"][0][: len(one["resps"][0])] == one["resps"][0]
                    assert row["filtered_resps"] == one["filtered_resps"]
            assert not order
            for name, figures in results["calibration"][task].items():
                for figure, value in expected["calibration"][task][name].items():
                    assert figures[figure] == (None if value is None else pytest.approx(value, rel=1e-3))
