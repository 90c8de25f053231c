"""Rows of data: read from the Hub, a folder or a file, with errors that name their place.

What a row says is not changed here, but for SVAMP, whose problems come with equations in place of answers. Formats are
the matter of `recipes/formats.py`, tokens of `recipes/tokens.py`.
"""

import csv
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Json,
    Value,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
)
from datasets.data_files import EmptyDatasetError

from eval.json_rows import read_rows
from recipes.formats import BESIDE_TURNS, COLUMNS, FORMATS, KNOWN_COLUMNS, TURNS, check_rows, check_texts, format_of
from recipes.yaml_values import did_you_mean

NUM_SVAMP_TRAIN = 700  # of 1,000, the rest is for testing, as on the Hub
TEXT_SUFFIXES = (".json", ".jsonl", ".csv")
ADVICE = f"give one JSON object a line, with {'; or '.join(' and '.join(columns) for columns in FORMATS.values())}"


def load_rows(
    dataset: str,
    config_name: str | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
) -> DatasetDict:
    """Load the rows to train on, as `train`, and those of `test` if there are any: the Hub's, a folder's or a file's.

    JSON files on this machine are read as they are: the errors of `datasets` name neither their line nor their column,
    and it takes text that looks like a date for a date. A data set with the columns of SVAMP is turned into questions
    and answers; without a `test` split, what follows its first 700 problems is that.

    Args:
        dataset (`str`): Hub id, or path of a folder or of a JSON, JSON Lines, CSV or Parquet file.
        config_name (`str`, *optional*): its configuration; None: its only one, `main` or `default`.
        split (`str`): what to train on.
        columns (`dict`, *optional*): its names to those of `FORMATS`; the columns that are not named are left out.

    Raises:
        ValueError: the data, a line, a column, a turn or the split is missing, empty or broken, or rows are of
            several formats.
    """
    for number, name in enumerate(wanted := list((columns or {}).values())):
        if name not in KNOWN_COLUMNS:
            raise ValueError(f"columns gives {name}, no column of a format; {did_you_mean(name, KNOWN_COLUMNS)}")
        if name in wanted[:number]:
            raise ValueError(f"columns gives {name} twice; a row has one.")
    found = _find_splits(dataset, config_name)
    if split not in found:
        raise ValueError(f"{dataset} has the splits {', '.join(found)}, but training needs one called {split}.")
    splits = DatasetDict({"train": _read(dataset, split, found[split], columns)})
    if "test" in found and split != "test":
        splits["test"] = _read(dataset, "test", found["test"], columns)
    return _from_svamp(splits)


def _find_splits(dataset: str, config_name: str | None) -> dict[str, list[str]] | DatasetDict:
    """Find the files of each split, where they are here and of text; else load the splits."""
    if is_file := Path(dataset).is_file():
        data_files: dict[str, list[str]] = {"train": [dataset]}
    else:
        config_name = _choose_config(dataset, config_name)
        data_files = load_dataset_builder(dataset, config_name).config.data_files
    paths = [Path(path) for files in data_files.values() for path in files]
    suffixes = {path.suffix for path in paths}
    if is_file and not suffixes <= {*TEXT_SUFFIXES, ".parquet"}:
        raise ValueError(f"{dataset} must end in {', '.join(TEXT_SUFFIXES)} or .parquet.")
    if suffixes <= set(TEXT_SUFFIXES) and all(map(Path.is_file, paths)):
        return {str(split): files for split, files in data_files.items()}
    if is_file:
        _check_no_pattern(dataset)
    try:
        return load_dataset("parquet", data_files=data_files) if is_file else load_dataset(dataset, config_name)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{dataset} has no rows: {error}") from error


def _read(dataset: str, split: str, found: list[str] | Dataset, columns: dict[str, str] | None) -> Dataset:
    if isinstance(found, Dataset):
        return _known_columns(f"{dataset}, split {split}", found, columns)
    return _read_split(found, split, columns)


def _read_split(paths: list[str], split: str, columns: dict[str, str] | None) -> Dataset:
    """Read JSON and CSV files, which are one split, as they are."""
    placed = [pair for path in paths for pair in _read_file(path)]
    placed = [(place, _rename(place, _object(place, row), columns)) for place, row in placed]
    names = check_rows(placed)
    if "Equation" in names:
        placed = [(place, {name: str(row[name]) for name in names}) for place, row in placed]
    # Turns as JSON: as columns of columns they would all get each other's keys.
    first = placed[0][1]
    features = Features({name: Value("string") if isinstance(first.get(name), str) else Json() for name in names})
    rows = {name: [row.get(name) for _, row in placed] for name in names}
    try:
        kept = Dataset.from_dict(rows, features=features, split=split)
    except UnicodeEncodeError as error:
        raise ValueError(f"{', '.join(paths)} holds half a character, which is no text: {error}.") from error
    for name in (name for name in TURNS if features.get(name) == Json()):
        for (place, row), value in zip(placed, kept[name], strict=True):
            if value != row[name]:
                raise ValueError(f"{place}: {name} holds NaN or a number of more than 64 bits, got {row[name]!r:.99}.")
    return kept


def _read_file(path: str) -> list[tuple[str, Any]]:
    """Read a file with the place of every row; all that a CSV file holds is text."""
    if not path.endswith(".csv"):
        return read_rows(path, ADVICE)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}, is not CSV in UTF-8: {error}.") from error
    for place, row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{place} has another number of columns than the {len(reader.fieldnames or [])} named.")
    if not rows:
        raise ValueError(f"{path} is empty; give a line of column names, and one a row.")
    return rows


def _known_columns(place: str, rows: Dataset, columns: dict[str, str] | None) -> Dataset:
    """Check the rows of a library's data set, and keep what is known of them."""
    if not len(rows):
        raise ValueError(f"{place} has no rows.")
    old_names = _rename(place, {name: name for name in rows.column_names}, columns)
    rows = rows.select_columns(list(old_names.values())).rename_columns({old: new for new, old in old_names.items()})
    wanted = FORMATS[format_of(place, rows.column_names)]
    check_rows((f"{place}, row {number}", row) for number, row in enumerate(rows, start=1))
    return rows.select_columns([*wanted, *(name for name in BESIDE_TURNS if name in rows.column_names)])


def _rename(place: str, row: dict[str, Any], columns: dict[str, str] | None) -> dict[str, Any]:
    if columns is None:
        return row
    for name in columns:
        if name not in row:
            raise ValueError(f"{place} has no column {name}, which columns renames; {did_you_mean(name, list(row))}")
    return {new: row[old] for old, new in columns.items()}


def _object(place: str, row) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} is not a JSON object, got {row!r:.60}.")
    return row


# ---- questions and answers ----


def _from_svamp(splits: DatasetDict) -> DatasetDict:
    if "Equation" not in splits["train"].column_names:
        return splits
    splits = DatasetDict({name: _solve(rows) for name, rows in splits.items()})
    if "test" not in splits and len(splits["train"]) > NUM_SVAMP_TRAIN:
        whole = splits["train"]
        splits["train"] = whole.select(range(NUM_SVAMP_TRAIN))
        splits["test"] = whole.select(range(NUM_SVAMP_TRAIN, len(whole)))
    return splits


def _solve(problems: Dataset) -> Dataset:
    if "Equation" not in problems.column_names:
        return problems
    return problems.map(svamp_problem, remove_columns=problems.column_names, desc="SVAMP")


def svamp_problem(row: dict) -> dict[str, str]:
    """Turn a problem of SVAMP into a question and an answer that reasons by its equation: `8 - 3 = 5\\n#### 5`."""
    equation = re.sub(r"(\d)\.0\b", r"\1", str(row["Equation"])).strip()
    equation = re.sub(r"^\( (.*) \)$", r"\1", equation)  # the outermost pair, which every equation has
    answer = f"{float(row['Answer']):.15g}"
    return {"question": f"{row['Body']} {row['Question']}", "answer": f"{equation} = {answer}\n#### {answer}"}


def read_problems(path: str) -> list[dict]:
    """Read one JSON Lines file of questions and answers, or one JSON array of them; SVAMP's are turned into such.

    Raises:
        ValueError: the file is missing, empty or broken; the message names its path and line.
    """
    problems = _solve(_read_split([path], "test", None))
    if "question" not in problems.column_names:
        raise ValueError(f"{path} has {', '.join(problems.column_names)}, and a task reads {' and '.join(COLUMNS)}.")
    return problems.to_list()


def read_json_lines(path: str, columns: tuple[str, ...]) -> list[dict]:
    """Read the rows of a JSON Lines file, or of a JSON array, each with text in every one of `columns`.

    Raises:
        ValueError: the file is missing, empty or broken; the message names its path and line.
    """
    rows = read_rows(path, f"give one JSON object a line with {' and '.join(columns)}")
    for place, row in rows:
        if missing := [name for name in columns if name not in _object(place, row)]:
            raise ValueError(f"{place} has the columns {', '.join(row)} and lacks {', '.join(missing)}.")
        check_texts(*columns)(place, row)
    return [row for _, row in rows]


# ---- where data are ----


def _choose_config(dataset: str, wanted: str | None) -> str:
    """Find the wanted configuration of a dataset; when none is given its `main`, its `default` or its only one."""
    looks_local = dataset.startswith((".", "/", "~")) or Path(dataset).exists()
    if looks_local and not Path(dataset).is_dir():
        raise ValueError(
            f"No dataset folder or file at {dataset}; give one with train.jsonl and test.jsonl, or a Hub id."
        )
    if looks_local:
        _check_no_pattern(dataset)
    try:
        names = get_dataset_config_names(dataset)
    except EmptyDatasetError as error:
        raise ValueError(f"{dataset} holds no data files; put train.jsonl and test.jsonl there.") from error
    if wanted is not None and wanted not in names:
        raise ValueError(f"{dataset} has no configuration {wanted}; it has {', '.join(names)}.")
    for name in (wanted, "main", "default"):
        if name is not None and name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise ValueError(f"{dataset} has the configurations {', '.join(names)}; set dataset_config to one of them.")


def _check_no_pattern(path: str) -> None:
    if set(str(Path(path).resolve())) & set("[]?*"):
        raise ValueError(f"The library datasets takes {path} for a pattern: rename folders that have [ ] ? or *.")
