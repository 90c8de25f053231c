"""The demo from its data to its table, with as little training as there can be."""

import json
from pathlib import Path

import pytest

from recipes import demo
from tests.helpers import read_results

TASKS = {"word_problems"} | {f"word_problems_{kind}" for kind in ("more_steps", "larger_numbers", "unseen_templates")}
METHODS = ("plain", "DIPNet", "DIPNet, mean of 8")


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    short = ["training.max_steps=2", "training.logging_steps=1", "evaluation.max_new_tokens=4"]
    monkeypatch.setattr(demo, "CONFIG", str(Path(demo.CONFIG).resolve()))
    monkeypatch.setattr(demo, "SIZES", dict.fromkeys(demo.SIZES, 16))
    monkeypatch.setattr(demo, "BASE_TRAINING", {"max_steps": 2})
    level = {"plain": [], "DIPNet": ["dip.init_noise_std=0.1"]}  # so short a base predicts nothing that noise disturbs
    methods = {name: [*settings, *short, *level[name]] for name, settings in demo.METHODS.items()}
    monkeypatch.setattr(demo, "METHODS", methods)
    monkeypatch.setattr(demo, "SEEDS", (1,))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def read_rows():
    return {(row["method"], row["seed"], row["task"]): row for row in read_results(demo.FOLDER)["rows"]}


def write_as_another_seed(method):
    """Copy the result file of a method's run to where seed 2 would have it, with one nat per token more."""
    results = read_results(demo.FOLDER / f"{method}-1")
    for scores in (results["scores"], results["ensemble_scores"] or {}):
        for numbers in scores.values():
            numbers["eval_nll"] += 1
    folder = demo.FOLDER / f"{method}-2"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.usefixtures("small_demo")
def test_the_demo_compares_both_methods_on_every_task(monkeypatch, capsys):
    demo.main()
    rows = read_rows()
    assert set(rows) == {(method, 1, task) for method in METHODS for task in TASKS}
    for row in rows.values():
        assert 0 <= row["exact_match,strict-match"] <= 1 and 0 <= row["ece,strict-match"] <= 1
        assert row["eval_nll"] > 0 and row["n"] == 16
    assert len({rows[method, 1, "word_problems"]["eval_nll"] for method in METHODS}) == 3
    for picture in ("losses.png", "noise.png"):
        assert (demo.FOLDER / picture).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"are in {demo.FOLDER}")
    # The folders of the runs hold what a user expects of a run.
    assert (demo.FOLDER / "DIPNet-1" / "adapter_model.safetensors").is_file()

    # Several seeds, without another run.
    for method in demo.METHODS:
        write_as_another_seed(method)
    folders = {method: [demo.FOLDER / f"{method}-{seed}" for seed in (1, 2)] for method in demo.METHODS}
    monkeypatch.setattr(demo, "SEEDS", (1, 2))
    demo.compare({method: [str(folder / "results.json") for folder in pair] for method, pair in folders.items()})
    both = read_rows()
    assert set(both) == {(method, seed, task) for method in METHODS for seed in (1, 2) for task in TASKS}
    for (method, seed, task), row in both.items():
        assert row["eval_nll"] == rows[method, 1, task]["eval_nll"] + (seed == 2)
    printed = capsys.readouterr().out
    for metric in ("Exact match", "NLL per token, nats", "ECE of the answers"):
        assert f"{metric}, mean +- standard deviation over 2 seeds" in printed
    assert printed.count("+- 0.7071") == len(METHODS) * len(TASKS)  # that of two values one apart
