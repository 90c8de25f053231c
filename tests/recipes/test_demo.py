"""The demo from its data to its table, with as little training as there can be."""

import json
from pathlib import Path

import pytest

from recipes import demo


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    short = ["training.max_steps=2", "training.logging_steps=1", "evaluation.max_new_tokens=4"]
    monkeypatch.setattr(demo, "CONFIG", str(Path(demo.CONFIG).resolve()))
    monkeypatch.setattr(demo, "SIZES", dict.fromkeys(demo.SIZES, 16))
    monkeypatch.setattr(demo, "BASE_TRAINING", {"max_steps": 2})
    level = {"plain": [], "DIPNet": ["dip.init_noise_std=0.1"]}  # so short a base predicts nothing that noise disturbs
    methods = {name: [*settings, *short, *level[name]] for name, settings in demo.METHODS.items()}
    monkeypatch.setattr(demo, "METHODS", methods)
    monkeypatch.setattr(demo, "SEEDS", (0, 1))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small_demo")
def test_the_demo_compares_both_methods_on_every_task(capsys):
    demo.main()
    results = json.loads((demo.FOLDER / "results.json").read_text())
    rows = {(row["method"], row["seed"], row["task"]): row for row in results["rows"]}
    tasks = {"word_problems"} | {
        f"word_problems_{kind}" for kind in ("more_steps", "larger_numbers", "unseen_templates")
    }
    methods = ("plain", "DIPNet", "DIPNet, mean of 8")
    assert set(rows) == {(method, seed, task) for method in methods for seed in (0, 1) for task in tasks}
    for row in rows.values():
        assert 0 <= row["exact_match,strict-match"] <= 1 and 0 <= row["ece,strict-match"] <= 1
        assert row["eval_nll"] > 0 and row["n"] == 16
    assert len({rows[method, 0, "word_problems"]["eval_nll"] for method in methods}) == 3
    for picture in ("losses.png", "noise.png"):
        assert (demo.FOLDER / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for metric in ("Exact match", "NLL per token, nats", "ECE of the answers"):
        assert f"{metric}, mean +- standard deviation over 2 seeds" in printed
    assert printed.splitlines()[-1].endswith(f"are in {demo.FOLDER}")
    # The folders of the four runs hold what a user expects of a run.
    assert (demo.FOLDER / "DIPNet-1" / "adapter_model.safetensors").is_file()
