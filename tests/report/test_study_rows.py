"""A study's figures against known answers."""

import numpy as np
import pytest

from report.study_rows import (
    LEAST_COVERAGE,
    Time,
    answer_curves,
    ensemble_nll,
    figures,
    noise_by_site,
    num_passes,
    relative_seconds,
    spreads,
    validation_curve,
)


def result(scores, **tasks):
    """A result file with one answer."""
    answers = {"one pass": {"nll": 2.0, "token_accuracy": 0.5, "token_ece": 0.1, "token_brier": 0.2, "scores": scores}}
    validation = [
        {"step": 1, "nll": 2.5},
        {"step": 2, "nll": 2.25},
        {"step": 2, "nll": 1.0},
    ]  # the last: test problems
    return {"answers": answers, "validation": validation, "provenance": {"config": {"evaluation": {"tasks": tasks}}}}


def test_passes_at_inference():
    assert [num_passes(answer) for answer in ("one pass", "distilled", "mean of 16")] == [1, 1, 16]


@pytest.mark.parametrize(("metric", "first"), [("exact_match", "strict-match"), ("acc", "none")])
def test_the_first_filter_is_taken_whatever_the_metric(metric, first):
    scores = {"nll": 2.0, f"{metric},{first}": 0.5, f"ece,{first}": 0.3, f"auroc,{first}": None}
    scores |= {f"{metric},flexible-extract": 0.9, "ece,flexible-extract": 0.9}
    found = figures(result({"task": scores}, task=None), "one pass")
    assert found == {
        "nll": 2.0,
        "token_accuracy": 0.5,
        "token_ece": 0.1,
        "token_brier": 0.2,
        "best_validation_nll": 2.25,
        "exact_match": 0.5,
        "answer_ece": 0.3,
    }


def test_a_task_of_another_distribution_has_figures_of_its_own():
    scores = {"nll": 3.0, "exact_match,strict-match": 0.25, "ece,strict-match": 0.9}
    found = figures(result({"svamp": scores}, task=None, svamp="svamp.jsonl"), "one pass")
    assert found == {
        "nll": 2.0,
        "token_accuracy": 0.5,
        "token_ece": 0.1,
        "token_brier": 0.2,
        "best_validation_nll": 2.25,
        "svamp exact match": 0.25,
        "svamp NLL": 3.0,
    }
    for little in ({"nll": 3.0}, {**scores, "n": 1}):  # nothing was generated, or as good as nothing
        assert "svamp exact match" not in figures(result({"svamp": little}, task=None, svamp="x"), "one pass")


def test_a_validation_nll_is_the_least_that_did_not_diverge():
    cell = result({}, task=None)
    cell["validation"] = [
        {"step": step, "nll": nll} for step, nll in enumerate((float("nan"), 3.0, 2.5, float("inf")))
    ]
    assert figures(cell, "one pass")["best_validation_nll"] == 2.5
    for diverged in ([], cell["validation"][:1]):
        assert "best_validation_nll" not in figures(cell | {"validation": diverged}, "one pass")


def test_smoothness_is_among_the_figures():
    cell = result({}, task=None)
    cell["answers"]["one pass"]["smoothness"] = {"lipschitz": 3.0, "layer_noise_rise": 0.5}
    found = figures(cell, "one pass")
    assert (found["lipschitz"], found["layer_noise_rise"]) == (3.0, 0.5)


def test_a_figure_is_over_the_seeds_that_have_it():
    found = spreads({"0": {"nll": 1.0, "auroc": 0.7}, "1": {"nll": 3.0}})
    assert found["auroc"] == {"values": {"0": 0.7}, "mean": 0.7, "std": None, "low": 0.7, "high": 0.7}
    assert (found["nll"]["mean"], found["nll"]["std"]) == (2.0, pytest.approx(2**0.5))
    assert spreads({}) == {}


def test_curves_pool_the_seeds():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(size=(2, 500))
    correct = (generator.uniform(size=(2, 500)) < confidence).astype(int)
    curves = answer_curves(list(zip(confidence.tolist(), correct.tolist())))
    assert sum(entry["count"] for entry in curves["reliability"]) == 1000
    assert all(abs(entry["accuracy"] - entry["confidence"]) < 0.3 for entry in curves["reliability"])
    coverage, risk = np.transpose(curves["risk_coverage"])
    assert LEAST_COVERAGE <= coverage[0] < 0.06 and (coverage[-1], risk[-1]) == (1, pytest.approx(1 - correct.mean()))
    assert risk[0] < 0.15
    alone = answer_curves([([0.5], [1])])
    assert alone["risk_coverage"] == [[1.0, 0.0]]


def test_an_ensemble_of_copies_is_the_model_and_one_of_two_is_no_worse_than_their_mean():
    log_probs = np.log(np.random.default_rng(0).uniform(0.05, 0.95, (2, 40)))
    assert ensemble_nll([log_probs[0]] * 3) == pytest.approx(-log_probs[0].mean())
    assert ensemble_nll(log_probs) == pytest.approx(-np.log(np.exp(log_probs).mean(0)).mean())
    assert ensemble_nll(log_probs) < -log_probs.mean()


def test_a_validation_curve_has_the_steps_of_all_seeds():
    curves = [{1: 4.0, 2: 3.0, 3: 2.0}, {1: 2.0, 2: 2.0}]
    results = [{"validation": [{"step": step, "nll": nll} for step, nll in curve.items()]} for curve in curves]
    results[1]["validation"].append({"step": 2, "nll": 9.0})  # of the test problems
    assert validation_curve(results) == [{"step": 1, "nll": 3.0}, {"step": 2, "nll": 2.5}]
    assert validation_curve([]) == []


def times_of(by_machine, ended=0.0):
    return {
        machine: {seed: Time(seconds=seconds, ended=ended) for seed, seconds in by_seed.items()}
        for machine, by_seed in by_machine.items()
    }


def test_times_are_compared_by_seed_on_the_machine_that_has_most_pairs():
    plain = times_of({"CPU": {"0": 10.0, "1": 30.0}, "GPU": {"0": 4.0, "1": 4.0, "2": 40.0}})
    two_machines = {"CPU": {"0": 40.0}, "GPU": {"0": 5.0, "1": 7.0, "2": 60.0}}
    assert relative_seconds(times_of(two_machines), plain) == 1.5
    assert relative_seconds(times_of({"CPU": {"0": 40.0}, "other": {"0": 5.0, "1": 7.0}}), plain) == 4
    assert relative_seconds(times_of({"other": {"0": 5.0}}), plain) is None and relative_seconds({}, plain) is None
    assert relative_seconds(times_of({"CPU": {"7": 5.0}}), plain) is None


def test_cells_of_different_hours_are_no_pair():
    plain = times_of({"CPU": {"0": 10.0, "1": 10.0}})
    assert relative_seconds(times_of({"CPU": {"0": 30.0}}, ended=3500.0), plain) == 3
    later = times_of({"CPU": {"0": 30.0}}, ended=7000.0)["CPU"] | times_of({"CPU": {"1": 20.0}})["CPU"]
    assert relative_seconds({"CPU": later}, plain) == 2


def test_noise_is_relative_to_where_it_began():
    runs = [{"noise": [{"name": "layer", "init_std": 0.1, "std": std}]} for std in (0.1, 0.3)]
    assert noise_by_site(runs) == [{"name": "layer", "relative_std": pytest.approx(2.0)}]
    assert noise_by_site([{"noise": None}]) is None and noise_by_site([]) is None
