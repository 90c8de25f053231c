"""Tables of result files: one run's summary, mean and spread over seeds, and what they refuse."""

import json
from pathlib import Path

import pytest

from report import format_seeds, format_summary


def test_summary_has_configuration_metrics_and_scores(write_results):
    text = format_summary(json.loads(Path(write_results("a", 1.25)).read_text()))
    lines = [line.split() for line in text.splitlines()]
    assert ["run", "runs/a"] in lines and ["projections", "none"] in lines
    assert ["num_steps", "20"] in lines and ["eval_nll", "1.2500"] in lines
    assert ["gsm8k_local.exact_match", "0.5000"] in lines


def test_mean_and_sample_deviation_over_seeds(write_results):
    groups = {
        "plain": [write_results("p0", 2.0), write_results("p1", 3.0, seed=1)],
        "dip": [write_results("d0", 1.5, noise=[{}])],
    }
    lines = format_seeds(groups, {name: name for name in ("eval_nll", "gsm8k_local.exact_match")}).splitlines()
    assert lines[2].split() == ["plain", "2", "2.5000", "+-", "0.7071", "0.5000", "+-", "0.0000"]
    assert lines[3].split() == ["dip", "1", "1.5000", "+-", "-", "0.5000", "+-", "-"]


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(write_results):
    files = [write_results("a", 2.0), write_results("b", 2.0, learning_rate=1e-4)]
    with pytest.raises(ValueError, match="differ in training.learning_rate"):
        format_seeds({"plain": files}, {"NLL": "eval_nll"})


def test_an_unknown_metric_lists_the_known_ones(write_results):
    with pytest.raises(ValueError, match="no metric accuracy.*eval_nll, gsm8k_local.exact_match"):
        format_seeds({"plain": [write_results("a", 2.0)]}, {"accuracy": "accuracy"})


def test_a_group_without_files_is_named():
    with pytest.raises(ValueError, match="plain has no result files"):
        format_seeds({"plain": []}, {"NLL": "eval_nll"})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="No result file at .*nothing.json"):
        format_seeds({"plain": [str(tmp_path / "nothing.json")]}, {"NLL": "eval_nll"})
