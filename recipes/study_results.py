"""What the cells of a study say: which are done, which value of each method is chosen, and the report's figures."""

import json
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any, NamedTuple

from recipes.study_config import Cell, StudyConfig, final_cells, tuning_cells
from report.comparison import bootstrap_interval, compare, holm, smallest_p_value, verdict
from report.provenance import versions


class CellResult(NamedTuple):
    """What is known of one cell."""

    state: str  # "done", "missing", or "other": it ran, with another configuration or other versions
    why: str = ""  # of a cell that does not count
    seconds: float | None = None  # from its last start to its end, with what starting costs
    nll: dict[str, float] = {}  # by answer: "last step", "best epoch", "mean of k"
    results: dict[str, Any] = {}  # the result file


def read_cell(cell: Cell) -> CellResult:
    """Read one cell's result file; it counts if its configuration and versions are those that are asked for."""
    path = cell.result_file
    if not path.is_file():
        return CellResult("missing", "began and did not end" if cell.run_folder.is_dir() else "not run")
    results = json.loads(path.read_text(encoding="utf-8"))
    recorded = results["provenance"]
    if differing := _differences(recorded, cell):
        return CellResult("other", f"ran with another {', '.join(differing)}", results=results)
    nll = {answer: figures["nll"] for answer, figures in results["answers"].items()}
    return CellResult("done", seconds=results["seconds"]["cell"], nll=nll, results=results)


def _differences(recorded: dict, cell: Cell) -> list[str]:
    """Name what differs of the configuration, but for the folder, and of the versions."""
    asked = json.loads(json.dumps(asdict(cell.config())))
    pairs = [(asked, recorded["config"], "{}"), (asked["training"], recorded["config"]["training"], "training.{}")]
    pairs.append((versions(), recorded["versions"], "version of {}"))
    return [
        name.format(key)
        for ours, theirs, name in pairs
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and key not in ("training", "output_dir")
    ]


def answers(results: dict) -> dict[str, float]:
    """Collect the NLL of each way in which a run answers."""
    nll = {"last step": results["metrics"]["eval_nll"]}
    if results["best_checkpoint"]:
        nll["best epoch"] = results["best_checkpoint"]["metrics"]["eval_nll"]
    if results["ensemble_scores"]:
        evaluation = results["provenance"]["config"]["evaluation"]
        task = next(name for name, path in evaluation["tasks"].items() if path is None)
        nll[f"mean of {evaluation['num_samples']}"] = results["ensemble_scores"][task]["eval_nll"]
    return nll


def validation_nll(study: StudyConfig) -> dict[str, dict[str, list[float]]]:
    """Average the tuning seeds: by method and answer, one NLL per value; methods whose tuning is not complete lack."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, method in study.methods.items():
        runs = [[read_cell(Cell(study, "tuning", name, v, s)).nll for s in study.tuning_seeds] for v in method.values]
        if all(nll for seeds in runs for nll in seeds):
            found[name] = {answer: [mean(nll[answer] for nll in seeds) for seeds in runs] for answer in runs[0][0]}
    return found


def choose(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Choose each method's value for each of its answers, by the least mean validation NLL."""
    return {
        name: {answer: study.methods[name].values[nll.index(min(nll))] for answer, nll in by_answer.items()}
        for name, by_answer in validation_nll(study).items()
    }


def summarize(study: StudyConfig) -> dict:
    """Collect every figure of the report, JSON-serializable: rows, comparisons, and what is missing or left out."""
    chosen, tuned = choose(study), validation_nll(study)
    cells = tuning_cells(study) + final_cells(study, chosen)
    read = {cell.folder: read_cell(cell) for cell in cells}
    rows = [
        _row(study, read, name, answer, value, min(tuned[name][answer]))
        for name, by_answer in chosen.items()
        for answer, value in by_answer.items()
    ]
    done = [found for found in read.values() if found.state == "done"]
    return {
        "study": json.loads(json.dumps(asdict(study))),
        "rows": rows,
        "comparisons": _comparisons(study, rows),
        "tuning": {name: {"values": study.methods[name].values, "nll": nll} for name, nll in tuned.items()},
        "missing": [_gap(study, cell, read) for cell in cells if read[cell.folder].state != "done"],
        "not_tuned": [name for name in study.methods if name not in tuned],
        "num_cells": {"done": len(done), "all": len(cells)},
        "commits": sorted({_commit(found.results) for found in done}),
        "hardware": sorted({found.results["provenance"]["hardware"]["cpu"] for found in done}),
        "versions": versions(),
    }


def _row(study: StudyConfig, read: dict, name: str, answer: str, value: Any, nll_of_value: float) -> dict:
    cells = [Cell(study, "final", name, value, seed) for seed in study.seeds]
    done = [cell for cell in cells if read[cell.folder].state == "done"]
    nll = {cell.seed: read[cell.folder].nll[answer] for cell in done}
    row = {"method": name, "answer": answer, "setting": study.methods[name].setting, "value": value}
    row |= {"validation_nll": nll_of_value, "nll": nll, "num_seeds": len(nll)}
    row["files"] = [str((cell.run_folder / "results.json").relative_to(study.output_dir)) for cell in done]
    if nll:
        row["mean"], row["std"] = mean(nll.values()), stdev(nll.values()) if len(nll) > 1 else None
        row["low"], row["high"] = bootstrap_interval(list(nll.values()))
        row["train_seconds"] = mean(_train_seconds(read[cell.folder].results) for cell in done)
    return row


def _comparisons(study: StudyConfig, rows: list[dict]) -> list[dict]:
    """Compare the reference with every other method that answers in the same way; Holm's family is one such way."""
    found = []
    for ours in (row for row in rows if row["method"] == study.reference):
        others = [row for row in rows if row["answer"] == ours["answer"] and row is not ours]
        pairs = [(row, [seed for seed in ours["nll"] if seed in row["nll"]]) for row in others]
        pairs = [(row, seeds) for row, seeds in pairs if seeds]
        compared = [compare([ours["nll"][s] for s in seeds], [row["nll"][s] for s in seeds]) for row, seeds in pairs]
        adjusted = holm([comparison.p_value for comparison in compared])
        for (row, _), comparison, p_value in zip(pairs, compared, adjusted, strict=True):
            found.append(
                {
                    "answer": ours["answer"],
                    "method": row["method"],
                    **comparison._asdict(),
                    "holm_p_value": p_value,
                    "smallest_p_value": smallest_p_value(comparison.num_pairs, len(pairs)),
                    "verdict": verdict(comparison, p_value, study.margin),
                }
            )
    return found


def _gap(study: StudyConfig, cell: Cell, read: dict) -> dict:
    return {"cell": str(cell.folder.relative_to(study.output_dir)), "why": read[cell.folder].why}


def _commit(results: dict) -> str:
    git = results["provenance"]["git"]
    return "unknown" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")


def _train_seconds(results: dict) -> float:
    return next(entry["train_runtime"] for entry in results["log_history"] if "train_runtime" in entry)
