"""What the cells of a study say: which are done, which value of each method is chosen, and the report's figures."""

import json
import math
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from recipes.study_config import Cell, StudyConfig, final_cells, tuning_cells
from report.results import read_results
from report.study_families import compare_references
from report.study_rows import (
    ONE_PASS,
    PLAIN,
    Time,
    answer_curves,
    ensemble_nll,
    figures,
    generated,
    noise_by_site,
    num_passes,
    relative_seconds,
    spreads,
    token_log_probs,
    validation_curve,
)

ENSEMBLE_SIZE = 4  # beside the number of samples of the methods that have them


class CellResult(NamedTuple):
    """What is known of one cell."""

    state: str  # "done", "missing", or "other": it ran, with another configuration
    why: str = ""  # of a cell that does not count
    seconds: float | None = None  # all of it, with what starting costs
    nll: dict[str, float] = {}  # by answer: "one pass", "mean of k", "distilled"
    results: dict[str, Any] = {}  # the result file


def read_cell(cell: Cell) -> CellResult:
    """Read one cell's result file; it counts if its configuration is the one that is asked for.

    The versions of the libraries may differ, as those of another machine do: the report says where they do.
    """
    path = cell.result_file
    if not path.is_file():
        return CellResult("missing", "began and did not end" if cell.folder.is_dir() else "not run")
    results = read_results(str(path))
    if differing := _differences(results, cell):
        return CellResult("other", f"ran with another {', '.join(differing)}", results=results)
    nll = {answer: values["nll"] for answer, values in results["answers"].items()}
    nll = {answer: math.inf if math.isnan(value) else value for answer, value in nll.items()}  # of one that diverged
    return CellResult("done", seconds=results["seconds"]["cell"], nll=nll, results=results)


def _differences(results: dict, cell: Cell) -> list[str]:
    """Name what differs of the configurations, but for the folders."""
    found = _differing_keys(asdict(cell.config()), results["provenance"]["config"])
    if cell.is_distilled and "distillation" in results:
        found += _differing_keys(asdict(cell.distill_config()), results["distillation"], "distill.")
    elif cell.is_distilled:
        found.append("distill")
    if cell.num_smoothness_problems != results.get("smoothness", {}).get("num_problems"):
        found.append("num_smoothness_problems")
    return found


def _differing_keys(asked: dict, recorded: dict, prefix: str = "") -> list[str]:
    asked, found = json.loads(json.dumps(asked)), []
    for key in sorted(asked.keys() | recorded.keys()):
        if key == "training":
            found += _differing_keys(asked[key], recorded[key], f"{prefix}training.")
        elif key not in ("output_dir", "teacher") and asked.get(key) != recorded.get(key):
            found.append(prefix + key)
    return found


def validation_nll(study: StudyConfig) -> dict[str, dict[str, list[float]]]:
    """Average the tuning seeds: by method and answer, one NLL per value; methods whose tuning is not complete lack."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, method in study.methods.items():
        runs = [[read_cell(Cell(study, "tuning", name, v, s)).nll for s in study.tuning_seeds] for v in method.values]
        if all(nll for seeds in runs for nll in seeds):
            found[name] = {answer: [mean(nll[answer] for nll in seeds) for seeds in runs] for answer in runs[0][0]}
    return found


def choose(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Choose each method's value for each answer that is tuned, by the least mean validation NLL.

    A distilled model has no tuning of its own: it learns from the mean of k with the value chosen for that.
    """
    return {
        name: {answer: study.methods[name].values[nll.index(min(nll))] for answer, nll in by_answer.items()}
        for name, by_answer in validation_nll(study).items()
    }


def finalists(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """The chosen values of the methods that run with all seeds; which others do is known once all are tuned."""
    chosen, tuned = choose(study), validation_nll(study)
    if study.num_finalists is None:
        return chosen
    kept = {*study.references, *(name for name in chosen if name.startswith(PLAIN))}
    if chosen.keys() == study.methods.keys():
        others = sorted(chosen.keys() - kept, key=lambda name: min(tuned[name][ONE_PASS]))
        kept.update(others[: study.num_finalists])
    return {name: by_answer for name, by_answer in chosen.items() if name in kept}


def summarize(study: StudyConfig) -> dict:
    """Collect every figure of the report, JSON-serializable: rows, comparisons, and what is missing or left out."""
    chosen, tuned = finalists(study), validation_nll(study)
    cells = tuning_cells(study) + final_cells(study, chosen)
    read = {cell.folder: read_cell(cell) for cell in cells}
    rows = _rows(study, read, chosen, tuned)
    rows += _deep_ensembles(study, read, rows)
    done = [found for found in read.values() if found.state == "done"]
    return {
        "study": json.loads(json.dumps(asdict(study))),
        "rows": rows,
        "comparisons": compare_references(rows, study.references, study.margin),
        "tuning": {name: _tuning(study, name, nll) for name, nll in tuned.items()},
        "missing": [_gap(study, cell, read) for cell in cells if read[cell.folder].state != "done"],
        "not_tuned": [name for name in study.methods if name not in tuned],
        "num_cells": {"done": len(done), "all": len(cells)},
        "commits": sorted({_commit(found.results) for found in done}),
        "hardware": sorted({_machine(found.results) for found in done}),
        "versions": _versions(done),
    }


def _rows(study: StudyConfig, read: dict, chosen: dict, tuned: dict) -> list[dict]:
    rows = []
    for name, by_answer in chosen.items():
        for answer, value in by_answer.items():
            row = _row(study, read, name, answer, value)
            rows.append(row | {"validation_nll": min(tuned[name][answer])})
        for answer, value in by_answer.items():
            distilled = _row(study, read, name, "distilled", value)
            if num_passes(answer) > 1 and distilled["num_seeds"]:
                rows.append(distilled)
    plain: dict[str, dict[str, Time]] = next((row["times"] for row in rows if row["method"] == PLAIN), {})
    return [row | {"relative_seconds": relative_seconds(row["times"], plain)} for row in rows]


def _row(study: StudyConfig, read: dict, name: str, answer: str, value: Any) -> dict:
    """One method with one way of answering, over the seeds that have it."""
    cells = {str(seed): Cell(study, "final", name, value, seed) for seed in study.seeds}
    nll = {seed: read[cell.folder].nll[answer] for seed, cell in cells.items() if answer in read[cell.folder].nll}
    done = {seed: read[cells[seed].folder].results for seed, value in nll.items() if value < math.inf}
    row: dict[str, Any] = {"method": name, "answer": answer, "num_passes": num_passes(answer)}
    row |= {"setting": study.methods[name].setting, "value": value, "validation_nll": None, "num_seeds": len(done)}
    row["files"] = {seed: _relative_file(cells[seed]) for seed in done}
    row["diverged"] = [seed for seed in nll if seed not in done]
    row["figures"] = spreads({seed: figures(result, answer) for seed, result in done.items()})
    answers = {seed: pair for seed, result in done.items() if (pair := generated(result, answer))}
    row["right"] = {seed: "".join(map(str, correct)) for seed, (_, correct) in answers.items()}
    row["curves"] = answer_curves(list(answers.values())) if answers else None
    row["validation"] = validation_curve(list(done.values()))
    row["noise"] = noise_by_site(list(done.values()))
    row["times"] = _times_by_machine(done, answer)
    return row


def _tuning(study: StudyConfig, name: str, nll: dict[str, list[float]]) -> dict:
    cells = [
        Cell(study, "tuning", name, value, seed) for value in study.methods[name].values for seed in study.tuning_seeds
    ]
    files = {f"{cell.value}, {cell.seed}": _relative_file(cell) for cell in cells}
    return {"values": study.methods[name].values, "nll": nll, "files": files}


def _relative_file(cell: Cell) -> str:
    return str(cell.result_file.relative_to(cell.study.output_dir))


def _deep_ensembles(study: StudyConfig, read: dict, rows: list[dict]) -> list[dict]:
    """Join the plain runs of disjoint groups of seeds: of those that have their tokens' file, of the same problems.

    Of their calibration nothing can be said: the files have the target's probability and not the others'.
    """
    plain = next((row for row in rows if row["method"] == PLAIN and row["answer"] == "one pass"), None)
    if plain is None:
        return []
    members, lengths, found = {}, None, []
    for seed, file in plain["files"].items():
        path = Path(study.output_dir, file)
        results = read[path.parent].results
        log_probs = token_log_probs(results, path.with_name("tokens.safetensors"), ONE_PASS)
        lengths = lengths or results["answers"][ONE_PASS]["problems"]["num_tokens"]
        if log_probs is not None and results["answers"][ONE_PASS]["problems"]["num_tokens"] == lengths:
            members[seed] = log_probs
    for size in sorted({ENSEMBLE_SIZE} | {row["num_passes"] for row in rows if row["num_passes"] > 1}):
        seeds = list(members)
        groups = [seeds[first : first + size] for first in range(0, len(seeds) - size + 1, size)]
        nll = {"+".join(group): {"nll": ensemble_nll([members[seed] for seed in group])} for group in groups}
        row = plain | {"method": f"deep ensemble of {size} ({PLAIN})", "answer": f"mean of {size}", "num_passes": size}
        row |= {"validation_nll": None, "right": {}, "curves": None, "validation": [], "noise": None}
        row |= {"figures": spreads(nll), "num_seeds": size * len(groups), "is_deep_ensemble": True}
        row["files"] = {seed: plain["files"][seed] for group in groups for seed in group}
        row["times"] = {
            machine: {seed: {**time, "seconds": size * time["seconds"]} for seed, time in by_seed.items()}
            for machine, by_seed in plain["times"].items()
        }
        row["relative_seconds"] = plain["relative_seconds"] and size * plain["relative_seconds"]
        found.append(row)
    return found


def _gap(study: StudyConfig, cell: Cell, read: dict) -> dict:
    return {"cell": str(cell.folder.relative_to(study.output_dir)), "why": read[cell.folder].why}


def _commit(results: dict) -> str:
    git = results["provenance"]["git"]
    return "unknown" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")


def _versions(done: list[CellResult]) -> dict[str, list[str]]:
    """The versions of each library in the cells, which is more than one where cells were run on several machines."""
    found: dict[str, set[str]] = {}
    for cell in done:
        for name, version in cell.results["provenance"]["versions"].items():
            found.setdefault(name, set()).add(str(version))
    return {name: sorted(of_library) for name, of_library in found.items()}


def _machine(results: dict) -> str:
    hardware = results["provenance"]["hardware"]
    return hardware.get("gpu") or hardware["cpu"]


def _times_by_machine(results: dict[str, dict], answer: str) -> dict[str, dict[str, Time]]:
    """The times of training, and distillation, by machine and seed; cells that were interrupted have none."""
    found: dict[str, dict[str, Time]] = {}
    for seed, result in results.items():
        parts = [result["seconds"].get(name) for name in ("training", *["distillation"] * (answer == "distilled"))]
        if None not in parts:
            ended = datetime.fromisoformat(result["provenance"]["date"]).timestamp()
            found.setdefault(_machine(result), {})[seed] = Time(seconds=sum(parts), ended=ended)
    return found
