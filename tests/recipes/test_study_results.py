"""What a study's result files say: values chosen, rows, comparisons and what is never claimed."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from recipes.study_config import Cell, load_study, tuning_cells
from recipes.study_results import choose, read_cell, summarize
from report.provenance import versions

METHODS = {
    "plain": {"setting": "training.weight_decay", "values": [0.0, 0.5]},
    "dip": {"setting": "dip.init_noise_std", "values": [0.1, 0.3], "num_samples": 2},
    "sam": {"set": {"regularizer.name": "sam"}, "setting": "regularizer.rho", "values": [0.1, 0.3]},
}


@pytest.fixture
def make_study(tmp_path):
    """Return a function that loads a study without cells."""

    def make(**changed):
        base = {
            "model": "m",
            "dataset": "d",
            "num_validation_samples": 3,
            "weights": "full",
            "training": {"output_dir": "unused", "use_cpu": True},
            "evaluation": {"tasks": {"gsm8k_local": None, "svamp": "svamp.jsonl"}},
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        values = {
            "base": str(tmp_path / "base.yaml"),
            "output_dir": str(tmp_path / "study"),
            "references": ["dip"],
            "margin": 0.01,
            "tuning_seeds": [100, 101],
            "seeds": list(range(12)),
            "methods": METHODS,
            **changed,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_study(tmp_path / "study.yaml")

    return make


def answer(nll, correct=None, confidence=None, **changed):
    """One way of answering, with two problems of one token each or with generated answers too."""
    scores, problems = {}, {"nll": [nll, nll], "num_tokens": [1, 1]}
    if correct is not None:
        confidence = confidence or [0.5] * len(correct)
        names = ("ece", "brier", "auroc", "aurc")
        of_filters = {f"{name},{f}": 0.1 for name in names for f in ("strict-match", "flexible-extract")}
        of_filters |= {"exact_match,strict-match": sum(correct) / len(correct), "exact_match,flexible-extract": 1.0}
        scores["gsm8k_local"] = {"nll": nll, **of_filters, "auroc,strict-match": None}
        scores["svamp"] = {"nll": nll + 1, "exact_match,strict-match": 0.25}
        problems["gsm8k_local"] = {"strict-match": {"correct": correct, "confidence": confidence}}
    figures = {"nll": nll, "num_tokens": 2, "token_accuracy": 0.5, "token_ece": 0.1, "token_brier": 0.2}
    return figures | {"scores": scores, "problems": problems} | changed


def write_cell(cell, answers, training=10.0, noise=None, validation=()):
    """Write a result file as `recipes/study.py` does."""
    recorded = {"config": asdict(cell.config()), "git": None, "hardware": {"cpu": "a CPU"}, "versions": versions()}
    recorded["date"] = "2026-11-27T12:00:00+00:00"
    result = {"answers": answers, "validation": list(validation), "noise": noise, "provenance": recorded}
    result["seconds"] = {"training": training, "cell": training + 20}
    if "distilled" in answers:
        result["seconds"]["distillation"] = 5.0
    cell.folder.mkdir(parents=True)
    (cell.folder / "result.json").write_text(json.dumps(result))


def tune(study, nll_of=lambda cell, answer: cell.value):
    """Write all tuning cells, of 10 s each; the least value is the best unless told otherwise."""
    for cell in tuning_cells(study):
        answers = ["one pass", "mean of 2"][: 1 + bool(study.methods[cell.method].num_samples)]
        write_cell(cell, {name: answer(nll_of(cell, name)) for name in answers})


def final(study, method, answers_of, **fields):
    """Write the cells of a method's first value, one per seed; `answers_of(seed)` gives their answers."""
    for seed in study.seeds:
        write_cell(Cell(study, "final", method, study.methods[method].values[0], seed), answers_of(seed), **fields)


def row_of(summary, method, answer="one pass"):
    (row,) = [row for row in summary["rows"] if (row["method"], row["answer"]) == (method, answer)]
    return row


def test_each_answer_takes_the_value_that_was_best_for_it_over_the_tuning_seeds(make_study):
    study = make_study()

    def nll_of(cell, name):
        best = (
            {"one pass": 0.1, "mean of 2": 0.3}[name] if cell.method == "dip" else study.methods[cell.method].values[0]
        )
        misleading = cell.method == "dip" and cell.seed == 100  # one seed alone would choose the other
        return 2.0 + abs(cell.value - best) * (-0.5 if misleading else 1.0)

    tune(study, nll_of)
    assert choose(study) == {
        "plain": {"one pass": 0.0},
        "dip": {"one pass": 0.1, "mean of 2": 0.3},
        "sam": {"one pass": 0.1},
    }


def test_a_value_that_diverged_is_not_chosen_and_a_seed_that_did_is_left_out(make_study):
    study = make_study()
    tune(study, lambda cell, name: math.nan if cell.value in (0.0, 0.1) else cell.value)
    assert choose(study)["plain"] == {"one pass": 0.5} and choose(study)["dip"]["one pass"] == 0.3
    for seed in study.seeds:
        for method, value in (("plain", 0.5), ("dip", 0.3)):
            nll = math.nan if (method, seed) == ("plain", 3) else 2.0 + seed
            write_cell(Cell(study, "final", method, value, seed), {"one pass": answer(nll)})
    row = row_of(summarize(study), "plain")
    assert row["diverged"] == ["3"] and row["num_seeds"] == len(study.seeds) - 1
    assert row["figures"]["nll"]["mean"] == pytest.approx(2.0 + (sum(study.seeds) - 3) / 11)
    compared = next(row for row in summarize(study)["comparisons"] if row["method"] == "plain")
    assert (compared["num_pairs"], compared["difference"]) == (11, 0.0)


def test_a_cell_is_missing_unfinished_other_or_done(make_study):
    study = make_study()
    cell = Cell(study, "final", "dip", 0.1, 0)
    assert read_cell(cell)[:2] == ("missing", "not run")
    cell.folder.mkdir(parents=True)
    assert read_cell(cell)[:2] == ("missing", "began and did not end")
    cell.folder.rmdir()
    write_cell(cell, {"one pass": answer(2.0)})
    read = read_cell(cell)
    assert (read.state, read.seconds, read.nll) == ("done", 30.0, {"one pass": 2.0})
    changed = cell._replace(study=make_study(set={"max_length": 32}))
    assert read_cell(changed)[:2] == ("other", "ran with another max_length")


def test_a_cell_that_lacks_what_the_study_measures_by_now_does_not_count(make_study):
    cell = Cell(make_study(), "final", "dip", METHODS["dip"]["values"][0], 0)
    write_cell(cell, {"one pass": answer(2.0)})
    assert read_cell(cell).state == "done"
    measured = cell._replace(study=make_study(num_smoothness_problems=4))
    assert read_cell(measured)[:2] == ("other", "ran with another num_smoothness_problems")
    distilled = cell._replace(study=make_study(distill={"num_samples": 2, "training": {"use_cpu": True}}))
    assert distilled.is_distilled and read_cell(distilled)[:2] == ("other", "ran with another distill")


def test_a_row_has_the_figures_of_its_seeds_and_their_files(make_study):
    study = make_study(seeds=[0, 1])
    tune(study)
    final(study, "plain", lambda seed: {"one pass": answer(2.0)}, training=10.0)
    noise = [{"name": "layer", "init_std": 0.1, "std": 0.2}]
    curve = [{"step": 1, "nll": 3.0}, {"step": 2, "nll": 2.0}]
    answers = {"one pass": answer(1.0), "mean of 2": answer(1.5), "distilled": answer(1.2)}
    fields = {"training": 15.0, "noise": noise, "validation": curve}
    final(study, "dip", lambda seed: answers | {"one pass": answer(1.0 + seed, [1, 0, 1, 1])}, **fields)
    summary = summarize(study)

    row = row_of(summary, "dip")
    assert row["figures"]["nll"]["values"] == {"0": 1.0, "1": 2.0} and row["figures"]["nll"]["mean"] == 1.5
    assert row["figures"]["nll"]["std"] == pytest.approx(0.5**0.5)
    assert row["figures"]["exact_match"]["mean"] == 0.75 and "auroc" not in row["figures"]
    assert row["figures"]["svamp NLL"]["mean"] == 2.5 and row["figures"]["svamp exact match"]["mean"] == 0.25
    assert row["right"] == {"0": "1011", "1": "1011"}
    assert row["curves"]["reliability"][0]["accuracy"] == 0.75
    assert row["validation"] == curve and row["noise"] == [{"name": "layer", "relative_std": 2.0}]
    for seed, file in row["files"].items():
        assert json.loads(Path(study.output_dir, file).read_text())["answers"]["one pass"]["nll"] == 1.0 + int(seed)

    costs = [
        (row["answer"], row["num_passes"], row["relative_seconds"]) for row in summary["rows"] if row["num_seeds"]
    ]
    assert costs == [("one pass", 1, 1.0), ("one pass", 1, 1.5), ("mean of 2", 2, 1.5), ("distilled", 1, 2.0)]
    assert row_of(summary, "dip", "distilled")["value"] == row_of(summary, "dip", "mean of 2")["value"]
    assert row_of(summary, "dip", "distilled")["validation_nll"] is None
    times = row_of(summary, "dip")["times"]["a CPU"]
    assert {seed: time["seconds"] for seed, time in times.items()} == {
        "0": 15.0,
        "1": 15.0,
    }  # tuning runs at other times
    assert len(summary["tuning"]["dip"]["files"]) == 4
    for name, file in summary["tuning"]["dip"]["files"].items():
        read = json.loads(Path(study.output_dir, file).read_text())
        assert name.startswith(f"{read['answers']['one pass']['nll']}, 10")  # the value, as `tune` writes it
    assert len(summary["missing"]) == 2 and json.loads(json.dumps(summary)) == summary


def test_a_method_against_itself_is_not_told_apart(make_study):
    """Two names of one method; what a seed does to a run is the same under both."""
    study = make_study(methods={"dip": METHODS["dip"], "again": METHODS["dip"]})
    tune(study)
    draws = np.random.default_rng(0).normal(2.0, 0.3, 12)
    right = np.random.default_rng(1).integers(2, size=(12, 20)).tolist()
    names = ("one pass", "mean of 2", "distilled")
    for method in study.methods:
        final(study, method, lambda seed: {name: answer(float(draws[seed]), right[seed]) for name in names})
    compared = summarize(study)["comparisons"]
    assert len(compared) == (5 + 1) * (2 + 1 + 2)  # five figures and the NLL of other data
    for entry in compared:
        assert (entry["method"], entry["difference"], entry["p_value"]) == ("again", 0, 1)
        assert entry["verdict"] in ("equivalent", "no difference shown")


def test_a_method_is_told_apart_by_its_runs_and_not_by_shuffled_names(make_study):
    study = make_study(methods={"dip": {**METHODS["dip"], "num_samples": None}, "plain": METHODS["plain"]})
    tune(study)
    generator = np.random.default_rng(0)
    pairs = generator.normal([1.0, 2.0], 0.1, (12, 2))
    shuffled = generator.permuted(pairs, axis=1)
    for number, method in enumerate(study.methods):
        final(study, method, lambda seed: {"one pass": answer(pairs[seed][number], token_ece=shuffled[seed][number])})  # noqa: B023
    verdicts = {entry["figure"]: entry["verdict"] for entry in summarize(study)["comparisons"]}
    assert verdicts == {"nll": "better", "token_ece": "no difference shown"}


def test_a_deep_ensemble_is_the_mean_of_disjoint_groups_of_plain_runs(make_study):
    study = make_study(seeds=list(range(9)))
    tune(study)
    probabilities = np.random.default_rng(0).uniform(0.1, 0.9, (9, 5))

    def answers_of(seed):
        return {"one pass": answer(float(-np.log(probabilities[seed]).mean()), num_tokens=5)}

    final(study, "plain", answers_of)
    assert not [row for row in summarize(study)["rows"] if "deep" in row["method"] and row["num_seeds"]]
    for seed in study.seeds:
        tokens = np.stack([np.log(probabilities[seed])] * 3, 1).astype(np.float32)
        save_file({"one pass": tokens}, Cell(study, "final", "plain", 0.0, seed).folder / "tokens.safetensors")
    row = row_of(summarize(study), "deep ensemble of 4 (plain)", "mean of 4")
    expected = [-np.log(probabilities[first : first + 4].mean(0)).mean() for first in (0, 4)]
    assert list(row["figures"]["nll"]["values"]) == ["0+1+2+3", "4+5+6+7"]
    assert list(row["figures"]["nll"]["values"].values()) == pytest.approx(expected)
    assert (row["num_passes"], row["relative_seconds"], sorted(row["files"])) == (4, 4.0, list("01234567"))

    stale = Cell(study, "final", "plain", 0.0, 0).folder / "tokens.safetensors"
    save_file({"one pass": np.zeros((5, 3), np.float32)}, stale)  # of another run than the result file
    row = row_of(summarize(study), "deep ensemble of 4 (plain)", "mean of 4")
    assert list(row["figures"]["nll"]["values"]) == ["1+2+3+4", "5+6+7+8"]


def test_a_deep_ensemble_joins_no_runs_whose_problems_are_in_another_order(make_study):
    study = make_study(seeds=list(range(5)))
    tune(study)
    for seed in study.seeds:
        given = answer(float(np.log(2)), num_tokens=4)
        given["problems"]["num_tokens"] = [3, 1] if seed == 1 else [1, 3]
        cell = Cell(study, "final", "plain", 0.0, seed)
        write_cell(cell, {"one pass": given})
        save_file({"one pass": np.log(np.full((4, 3), 0.5, np.float32))}, cell.folder / "tokens.safetensors")
    row = row_of(summarize(study), "deep ensemble of 4 (plain)", "mean of 4")
    assert list(row["figures"]["nll"]["values"]) == ["0+2+3+4"]
