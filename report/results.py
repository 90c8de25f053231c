"""Reading the `results.json` that a recipe writes: metrics, scores, log_history, provenance and noise."""

import json
from pathlib import Path

# Runs of one group may differ in these settings too, besides seed and folder: each student has a teacher of its own.
_DIFFERS_BY_SEED = {"teacher", "teacher_config.training.seed", "teacher_config.training.output_dir"}


def read_results(path: str) -> dict:
    """Read one `results.json`.

    Raises:
        ValueError: there is none at `path`.
    """
    if not Path(path).is_file():
        raise ValueError(f"No result file at {path}; recipes/finetune.py writes results.json into its output folder.")
    return json.loads(Path(path).read_text(encoding="utf-8"))


def numbers(results: dict) -> dict[str, float]:
    """Collect every metric and score of a run under one dotted name each (`gsm8k_local.exact_match`)."""
    return {**_flatten(results["metrics"]), **_flatten(results["scores"])}


def settings(results: dict) -> dict:
    """Collect a run's configuration under dotted names, without its seed and folder."""
    config = _flatten(results["provenance"]["config"], only_numbers=False)
    return {name: value for name, value in config.items() if name not in ("training.seed", "training.output_dir")}


def split_groups(groups: list[str]) -> dict[str, list[str]]:
    """Parse `LABEL=FILE[,FILE...]`: the files of each label."""
    files: dict[str, list[str]] = {}
    for group in groups:
        label, _, paths = group.partition("=")
        if not (label and paths):
            raise ValueError(f"A group is LABEL=FILE[,FILE...], got {group!r}.")
        if label in files:
            raise ValueError(f"Two groups are called {label}; give one, with a comma between its files.")
        files[label] = paths.split(",")
    return files


def check_same_settings(label: str, runs: list[dict]) -> None:
    """Refuse a group whose runs differ in more than their seeds and folders."""
    first, *others = [settings(run) for run in runs]
    for other in others:
        names = {name for name in first.keys() | other.keys() if first.get(name) != other.get(name)}
        if differing := sorted(names - _DIFFERS_BY_SEED):
            raise ValueError(f"The runs of {label} differ in {', '.join(differing)}; make them groups of their own.")


def _flatten(values: dict, prefix: str = "", only_numbers: bool = True) -> dict:
    flat: dict = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.", only_numbers)
        elif not only_numbers or isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat
