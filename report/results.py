"""Reading the `results.json` that a recipe writes: metrics, scores, log_history, provenance and noise."""

import json
from pathlib import Path


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


def _flatten(values: dict, prefix: str = "", only_numbers: bool = True) -> dict:
    flat: dict = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.", only_numbers)
        elif not only_numbers or isinstance(value, (int, float)):
            flat[f"{prefix}{name}"] = value
    return flat
