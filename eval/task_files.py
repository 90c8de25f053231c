"""The tasks of `eval/tasks/` and the files they read: whole configurations for the harness, checked before any work.

What a task needs of its files stands in its YAML: `test_split` and `fewshot_split` name them, `metadata: columns` says
what a problem holds; without it a problem is GSM8K's `question` and `answer`.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval.json_rows import read_rows

TASKS = Path(__file__).parent / "tasks"
GSM8K_COLUMNS: dict[str, str | list] = {"question": "text", "answer": "text"}


def resolve_tasks(names: Iterable[str], data_files: dict[str, dict[str, str]]) -> list[dict]:
    """Build the configurations of tasks of `eval/tasks/` over files, ready for `TaskManager.load`.

    Whole configurations, as lm-eval 0.4.13 does not look up the YAML of a name that is given with overrides; by the
    harness' own reader, as its index of tasks leaves `!function` unresolved.

    Args:
        names (`Iterable[str]`): names of tasks.
        data_files (`dict`): by task, its files: split to path.

    Raises:
        ValueError: there is no such task, or its files do not fit its splits.
    """
    index = TaskManager(include_path=str(TASKS), include_defaults=False).task_index
    names = list(names)
    if unknown := sorted(set(names) - set(index)):
        raise ValueError(
            f"No task called {', '.join(unknown)}; eval/tasks/ has {', '.join(sorted(index))}. "
            f"A task that comes with lm-eval takes no files: give the harness its name as it is."
        )
    if unused := sorted(set(data_files) - set(names)):
        raise ValueError(f"Files for {', '.join(unused)}, but the tasks are {', '.join(names)}.")
    return [_resolve(load_yaml(index[name].yaml_path), data_files.get(name, {})) for name in names]


def columns_of(task_config: dict) -> dict[str, str | list]:
    """What a problem of a task holds; see `check_json_file`."""
    return (task_config.get("metadata") or {}).get("columns", GSM8K_COLUMNS)


def check_data_files(task_configs: Iterable[str | dict]) -> None:
    """Check every file of the given configurations; names of the harness' own tasks are passed over.

    Raises:
        ValueError: a file is missing, empty or broken; the message names its path and line.
    """
    for config in task_configs:
        if isinstance(config, dict):
            columns = columns_of(config)
            for path in ((config.get("dataset_kwargs") or {}).get("data_files") or {}).values():
                check_json_file(path, columns)


def check_json_file(path: str, columns: dict[str, str | list]) -> None:
    """Check that a file holds JSON objects, one per line or in one array, each with the given columns.

    Args:
        path (`str`): the file.
        columns (`dict`): by name what a value is: a key of `KINDS`, or the list of the values allowed.

    Raises:
        ValueError: the file, a line, a column or a value is missing or broken; the message names path and line.
    """
    wanted = f"give JSON objects with {', '.join(columns)}, one per line or in one array"
    rows = read_rows(path, wanted)
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object, got {row!r:.60}.")
        if missing := [name for name in columns if name not in row]:
            raise ValueError(f"{place} has the columns {', '.join(row)} and lacks {', '.join(missing)}; {wanted}.")
        for name, kind in columns.items():
            allowed = row[name] in kind if isinstance(kind, list) else KINDS[kind](row[name])
            if not allowed:
                kind = f"one of {', '.join(kind)}" if isinstance(kind, list) else kind
                raise ValueError(f"{place}: {name} must be {kind}, got {row[name]!r:.60}.")


def read_data_files(
    data_files: dict[str, str], columns: dict[str, str | list] = GSM8K_COLUMNS, **metadata
) -> dict[str, Dataset]:
    """Read the columns of checked files as they are, for the harness.

    The loader of `datasets` takes a path for a pattern (`runs[1]/test.jsonl` is `runs1/test.jsonl` to it), and text
    that looks like a date for a date.

    Args:
        data_files (`dict[str, str]`): split to path.
        columns (`dict`): as for `check_json_file`.
        **metadata: what else a task says of itself, or the command line does.
    """
    splits = {}
    for split, path in data_files.items():
        rows = [row for _, row in read_rows(path, "give JSON objects")]
        splits[split] = Dataset.from_dict({name: _of_one_type([row[name] for row in rows]) for name in columns})
    return splits


def _of_one_type(values: list) -> list:
    """Numbers among texts become texts, as a column has one type."""
    some_are_text = len({isinstance(value, str) for value in values}) > 1
    return [str(value) for value in values] if some_are_text else values


def _resolve(config: dict, files: dict[str, str]) -> dict:
    splits = [config[key] for key in ("test_split", "fewshot_split") if config.get(key)]
    if missing := [split for split in splits if split not in files]:
        raise ValueError(
            f"{config['task']} reads a file for {' and one for '.join(splits)}; "
            f"{', '.join(missing)} is missing, got {', '.join(files) or 'none'}."
        )
    fewshot = config.get("fewshot_config") or {}
    if callable(fewshot.get("samples")):
        # The exemplars themselves, as a report of the run would name the function by its address in memory.
        config["fewshot_config"] = {**fewshot, "samples": fewshot["samples"]()}
    data_files = {split: str(path) for split, path in files.items()}
    return {**config, "custom_dataset": read_data_files, "dataset_kwargs": {"data_files": data_files}}


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    """Whether a value is a finite number; text that spells one out is, a truth value is not."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _is_list_of_text(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_text, value))


KINDS = {"text": _is_text, "a number": _is_number, "a list of text": _is_list_of_text}
