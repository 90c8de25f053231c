"""A study on a tiny model: cells that run once, are run again or never mix, what is chosen, and what is claimed."""

import json
import random
import shutil
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from recipes import finetune, study, study_cell
from recipes.config import dump_config
from recipes.study import main, report, run_process, run_study, seconds_of
from recipes.study_config import load_study, tuning_cells
from recipes.study_results import choose, read_cell, summarize
from report.comparison import smallest_p_value
from report.output_folder import occupied, write_whole
from report.provenance import versions

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("study-*.yaml"))
METHODS = {
    "plain": {"setting": "training.weight_decay", "values": [0.0, 0.5]},
    "dip": {"setting": "dip.init_noise_std", "values": [0.1, 0.3], "num_samples": 2},
}

QUANTIZED = {
    "num_smoothness_problems": 1,
    "set": {"weights": {"peft_type": "LORA", "r": 2}, "quantization": {"load_in_8bit": True}},
}


@pytest.fixture
def make_study(model_folder, problems_folder, tmp_path):
    """Return a function that writes a study of the tiny model, some keys changed, and returns its file."""

    def make(name="study", **changed):
        training = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True}
        training |= {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "nll"}
        base = {
            "model": str(model_folder),
            "dataset": str(problems_folder),
            "max_length": 64,
            "num_validation_samples": 3,
            "weights": "full",
            "training": {"output_dir": "unused", "save_steps": 1, **training},
            "evaluation": {"limit": 2, "max_new_tokens": 2},
        }
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        values = {
            "base": str(tmp_path / "base.yaml"),
            "output_dir": str(tmp_path / name),
            "references": ["dip"],
            "margin": 0.01,
            "tuning_seeds": [100],
            "seeds": [0, 1],
            "methods": METHODS,
            "distill": {"num_samples": 2, "training": {"max_steps": 1, "use_cpu": True}},
            **changed,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / f"{name}.yaml"

    return make


def recipe(cell, seconds_left):
    """Run a cell as its process does."""
    study_cell.run_cell(cell)


def writes(nll_of, seconds=0.0):
    """A runner that trains nothing and writes a result file with `nll_of(cell)` for the NLL."""

    def run(cell, seconds_left):
        recorded = {"config": asdict(cell.config()), "git": None, "hardware": {"cpu": "a CPU"}, "versions": versions()}
        recorded["date"] = "2026-11-27T12:00:00+00:00"
        figures = {"token_accuracy": 0.5, "token_ece": 0.1, "token_brier": 0.2, "num_tokens": 4, "scores": {}}
        result = {
            "answers": {"one pass": {"nll": nll_of(cell), **figures, "problems": {"nll": [1.0], "num_tokens": [4]}}},
            "validation": [{"step": 1, "nll": 1.0}],
            "num_steps": 2,
            "seconds": {"training": 1.0, "cell": seconds},
            "noise": None,
            "provenance": recorded,
        }
        if cell.is_distilled:
            result["distillation"] = asdict(cell.distill_config())
        write_whole(cell.result_file, json.dumps(result))

    return run


def finish(path, run, **arguments):
    """Run what is missing of a study, and return it."""
    run_study(load_study(path), run, **{"only": [], "deadline": None, "start": time.time(), **arguments})
    return load_study(path)


def test_a_study_tunes_on_validation_problems_and_scores_the_best_value_with_every_seed(
    make_study, problems_folder, monkeypatch
):
    scored = []

    def run(cell, seconds_left):
        monkeypatch.setattr(study_cell.shutil, "rmtree", lambda *_, **__: None)
        recipe(cell, seconds_left)
        monkeypatch.undo()
        scored.append((cell, (cell.run_folder / "data" / "test.jsonl").read_text().splitlines()))

    done = finish(make_study(seeds=[0]), run)
    trained = (problems_folder / "train.jsonl").read_text().splitlines()
    for cell, lines in scored:
        assert (set(map(_question, lines)) <= set(map(_question, trained))) == (cell.phase == "tuning")
        assert len(lines) == (3 if cell.phase == "tuning" else 5)
        assert [entry["step"] for entry in read_cell(cell).results["validation"]] == [1, 2]
    chosen = choose(done)
    assert set(chosen["plain"]) == {"one pass"} and set(chosen["dip"]) >= {"one pass", "mean of 2"}
    for answer in ("one pass", "mean of 2"):
        nll = {cell.value: read_cell(cell).nll[answer] for cell in tuning_cells(done) if cell.method == "dip"}
        assert chosen["dip"][answer] == min(nll, key=nll.get)
    summary = summarize(done)
    assert not summary["missing"]
    runs = [row for row in summary["rows"] if "is_deep_ensemble" not in row]
    assert [(row["method"], row["answer"], row["num_seeds"]) for row in runs] == [
        ("plain", "one pass", 1),
        ("dip", "one pass", 1),
        ("dip", "mean of 2", 1),
        ("dip", "distilled", 1),
    ]

    report(done)
    folder = Path(done.output_dir)
    assert json.loads((folder / "study.json").read_text())["num_cells"] == summary["num_cells"]
    page = (folder / "study.html").read_text()
    assert "data:image/png;base64," in page and "(too few seeds: the least possible p is" in page
    for row in runs:
        shown = f"{row['figures']['nll']['mean']:.4f}"
        assert shown in page and shown in (folder / "study.md").read_text()
        for seed, file in row["files"].items():
            assert json.loads((folder / file).read_text())["provenance"]["seed"] == int(seed) and file in page


def _question(line):
    return json.loads(line)["question"]


def test_a_killed_cell_counts_for_nothing_and_is_run_again_to_the_same_numbers(make_study):
    one = {"methods": {"dip": {**METHODS["dip"], "values": [0.1]}}, "seeds": [0]}
    path, whole = make_study(**one), finish(make_study("whole", **one), recipe)

    def killed(cell, seconds_left):
        (cell.folder / "config.yaml").write_text(dump_config(cell.config()))
        finetune.main([str(cell.folder / "config.yaml")])
        (cell.run_folder / "results.json").unlink()

    halves = finish(path, killed)
    assert {read_cell(cell).why for cell in study.all_cells(halves)} == {"began and did not end"}
    assert not choose(halves) and not summarize(halves)["rows"]
    again = finish(path, recipe)
    for cell in study.all_cells(again):
        found = read_cell(cell)
        assert found.nll == read_cell(cell._replace(study=whole)).nll
        assert set(found.nll) == {"one pass", "mean of 2", *(["distilled"] if cell.phase == "final" else [])}
        assert not cell.run_folder.exists() and not cell.student_folder.exists()


def test_a_change_of_configuration_or_versions_never_mixes_unsaid(make_study, monkeypatch):
    finish(make_study(), writes(lambda cell: 1.0))
    changed = finish(make_study(set={"training.learning_rate": 0.5}), pytest.fail)  # nothing is run over it
    summary = summarize(changed)
    assert not summary["rows"] and summary["not_tuned"] == ["plain", "dip"]
    assert {gap["why"] for gap in summary["missing"]} == {"ran with another training.learning_rate"}

    monkeypatch.setitem(globals(), "versions", lambda: {"torch": "0.1"})  # as the cells that follow record it
    more = finish(make_study(seeds=[0, 1, 2]), writes(lambda cell: 1.0))
    assert len(summarize(more)["versions"]["torch"]) == 2
    report(more)
    assert "torch 0.1 and" in (Path(more.output_dir) / "study.html").read_text()


def test_an_unfinished_run_of_another_configuration_is_begun_anew(make_study):
    begun = []

    def dies(cell, seconds_left):
        begun.append((cell.run_folder / "half").exists())
        cell.run_folder.mkdir(exist_ok=True)
        (cell.run_folder / "half").touch()

    for change in ({}, {}, {"set": {"max_length": 32}}):
        finish(make_study(**change, methods={"dip": METHODS["dip"]}), dies)
    assert begun == [False] * 2 + [True] * 2 + [False] * 2


def test_a_method_against_itself_is_the_same_to_the_bit_and_not_told_apart(make_study):
    one = {**METHODS["dip"], "values": [0.1]}
    done = finish(make_study(methods={"dip": one, "again": one}, seeds=[0]), recipe)
    first, again = (read_cell(cell) for cell in study.all_cells(done) if cell.phase == "final")
    assert first.nll == again.nll and first.results["noise"] == again.results["noise"]
    compared = [row for row in summarize(done)["comparisons"] if row["answer"] == row["other_answer"]]
    assert compared
    for row in compared:
        assert (row["difference"], row["p_value"], row["verdict"]) == (0, 1, "no difference shown")


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_labels_that_say_nothing_tell_no_methods_apart(make_study, tmp_path, problems_folder, is_shuffled):
    """A stand-in for a method that learns more, where there is something to learn; the data are configured."""
    shuffled = shutil.copytree(problems_folder, tmp_path / "shuffled")

    def nll_of(cell):
        learns = cell.method == "dip" and cell.config().dataset != str(shuffled)
        return random.Random(f"{cell.method} {cell.value} {cell.seed}").gauss(1.0 - learns, 0.1)

    changes = {"set": {"dataset": str(shuffled)}} if is_shuffled else {}
    done = finish(make_study(seeds=list(range(10)), **changes), writes(nll_of))
    (compared,) = [row for row in summarize(done)["comparisons"] if row["figure"] == "nll"]
    assert compared["verdict"] == ("no difference shown" if is_shuffled else "better")


def test_only_the_best_on_validation_problems_run_with_all_seeds(make_study):
    """And the references and plain, however they did; these as soon as they are tuned."""
    nll = {"dip": 3.0, "variant": 3.0, "plain": 3.0, "good": 1.0, "bad": 2.0, "best": 0.0}
    methods = dict.fromkeys(nll, METHODS["plain"]) | {"dip": METHODS["dip"]}
    path = make_study(methods=methods, references=["dip", "variant"], num_finalists=2)
    always = {"dip", "variant", "plain"}

    def final_methods(done):
        return {cell.method for cell in study.all_cells(done) if cell.phase == "final"}

    assert final_methods(finish(path, writes(lambda cell: nll[cell.method]), only=[*always, "best"])) == always
    done = finish(path, writes(lambda cell: nll[cell.method]))
    assert final_methods(done) == {*always, "good", "best"}
    summary = summarize(done)
    assert {row["method"] for row in summary["rows"] if row["num_seeds"]} == {*always, "good", "best"}
    assert final_methods(replace(done, num_finalists=0)) == always
    assert not summary["missing"] and set(summary["tuning"]) == nll.keys()


def test_no_cell_starts_that_would_not_end_in_time(make_study, monkeypatch):
    started = []

    def run(cell, seconds_left):
        started.append((cell, seconds_left))
        writes(lambda cell: 1.0, seconds=100)(cell, seconds_left)

    monkeypatch.setattr(study.time, "monotonic", lambda: 0.0)
    path = make_study()
    finish(path, run, deadline=99.0)  # how long one takes is not known before the first
    assert len(started) == 1 and started[0][1] == 99.0
    finish(path, run, deadline=99.0)
    assert len(started) == 1
    finish(path, run, deadline=101.0)
    assert len(started) == 8


def test_a_process_is_ended_when_its_time_is_over(make_study, monkeypatch):
    processes = []
    monkeypatch.setattr(study_cell, "run_cell", lambda cell: time.sleep(1000))
    monkeypatch.setattr(study, "stop", lambda process, stop=study.stop: (processes.append(process), stop(process)))
    cell = tuning_cells(load_study(make_study()))[0]
    cell.folder.mkdir(parents=True)
    run_process(cell, 0.01)
    assert processes[0].exitcode == -signal.SIGTERM and read_cell(cell).state == "missing"


def test_a_cell_that_fails_is_left_for_the_next_start_by_every_process(make_study):
    path, begun, start = make_study(seeds=[0]), [], time.time()

    def fails(cell, seconds_left):
        begun.append(cell.folder)

    finish(path, fails, start=start)
    finish(path, fails, start=start)  # another process of that start
    assert len(begun) == len(set(begun)) == 4
    finish(path, fails)
    assert len(begun) == 8


def test_two_processes_never_run_the_same_cell(make_study):
    """Two threads: a lock is between folders' holders, whichever they are."""
    path, ran, now = make_study(seeds=[0, 1, 2, 3]), [], set()

    def run(cell, seconds_left):
        assert cell.folder not in now
        now.add(cell.folder)
        ran.append(cell.folder)
        time.sleep(0.02)
        writes(lambda cell: 1.0)(cell, seconds_left)
        now.remove(cell.folder)

    threads = [threading.Thread(target=finish, args=(path, run)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cells = {cell.folder for cell in study.all_cells(load_study(path))}
    assert len(ran) == len(set(ran)) == len(cells) == 4 + 2 * 4


def test_an_occupied_cell_is_left_to_its_process(make_study):
    path = make_study()
    cells = tuning_cells(load_study(path))
    holder = occupied(cells[0].folder)
    ran = []

    def run(cell, seconds_left):
        ran.append(cell.folder)
        writes(lambda cell: 1.0)(cell, seconds_left)
        if len(ran) == 5:  # all but the occupied one and what hangs on it
            holder.__exit__(None, None, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "SECONDS_TO_WAIT", 0)
        holder.__enter__()
        finish(path, run)
    assert cells[0].folder not in ran[:5] and cells[0].folder in ran[5:] and len(ran) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {**METHODS, "sam": {"setting": "regularizer", "values": [None]}}}, "needs as many values"),
        ({"methods": {**METHODS, "dip": {"setting": "dip.no", "values": [1, 2]}}}, "Unknown key dip.no"),
        ({"methods": {"dip": {"setting": "dip.init_noise_std", "values": [0.1, 0.1]}}}, "not all different"),
        ({"methods": {"dip": {"setting": "training.seed", "values": [1, 2]}}}, "training.seed is set by the study"),
        ({"methods": {"dip": {"values": [1, 2]}}}, "needs a setting"),
        ({"methods": {"a/b": METHODS["plain"]}, "references": ["a/b"]}, "one of a folder"),
        ({"methods": {"dip": {**METHODS["plain"], "sets": {}}}}, "did you mean methods.dip.set"),
        ({"set": {"num_validation_samples": None}}, "needs num_validation_samples"),
        ({"references": ["dip", "sam"]}, "one or more of the methods plain, dip, got"),
        ({"references": []}, "references must list one or more"),
        ({"seeds": [1, 1]}, "seeds must be a list of different seeds"),
        ({"tuning_seeds": []}, "tuning_seeds must be a list"),
        ({"margin": 0}, "margin must be positive"),
        ({"num_finalists": -1}, "num_finalists must be null, or 0 or more, got -1"),
        ({"num_smoothness_problems": 0}, "num_smoothness_problems must be null, or 1 or more, got 0"),
        (QUANTIZED, "num_smoothness_problems: plain has a quantized base"),
        (
            {"num_smoothness_problems": 1, "set": {"weights": "frozen"}, "methods": {"dip": METHODS["dip"]}},
            "no trained weights",
        ),
        ({"budget": 1}, "Unknown key budget"),
        ({"distill": {"teacher": "runs/it"}}, "Unknown key distill.teacher"),
        ({"distill": {"num_samples": 0}}, "num_samples must be"),
    ],
)
def test_a_study_that_could_not_run_is_refused_before_any_work(make_study, changes, message):
    with pytest.raises(ValueError, match=message):
        load_study(make_study(**changes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_repository_studies_load_and_open_with_their_launch_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = load_study(path.relative_to(ROOT))
    assert path.read_text().startswith(f"# python recipes/study.py recipes/configs/{path.name} ")
    assert loaded.output_dir == f"recipes/results/study/{path.stem.removeprefix('study-')}"
    always = {*loaded.references, *(name for name in loaded.methods if name.startswith("plain"))}
    num_others = len(loaded.methods) - 1
    if loaded.num_finalists is not None:
        num_others = min(num_others, len(always) + loaded.num_finalists - 1)
    num_rows = num_others if loaded.distill is None else 2 * num_others  # each may be distilled too
    assert smallest_p_value(len(loaded.seeds), num_rows) < 0.01, "a study that could show nothing"


def test_a_key_that_is_missing_is_named(tmp_path):
    (tmp_path / "study.yaml").write_text("base: a\n")
    with pytest.raises(ValueError, match="lacks margin, methods, output_dir"):
        load_study(tmp_path / "study.yaml")


def test_times_of_the_command_line():
    assert [seconds_of(text) for text in ("90s", "1.5m", "2h")] == [90, 90, 7200]
    with pytest.raises(ValueError, match="10"):
        seconds_of("10")


def test_unknown_methods_of_the_command_line_are_refused(make_study):
    with pytest.raises(ValueError, match="no method of this study; it has plain, dip"):
        main([str(make_study()), "--only", "sam"])


def test_from_the_command_line_a_cell_is_a_process(make_study, capfd):
    path = make_study(methods={"dip": {"setting": "dip.init_noise_std", "values": [0.1]}}, seeds=[0])
    (tuning,) = tuning_cells(load_study(path))
    tuning.folder.mkdir(parents=True)
    recipe(tuning, None)
    handler = signal.getsignal(signal.SIGTERM)
    main([str(path), "--only", "dip", "--budget", "1h", "--jobs", "2"])
    signal.signal(signal.SIGTERM, handler)
    (_, final) = study.all_cells(load_study(path))
    assert read_cell(final).state == "done", (final.folder / "log.txt").read_text()
    assert f"\n{final.folder}: done, " in capfd.readouterr().out  # whichever process ran it
