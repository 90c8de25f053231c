"""Rows of data: read from the Hub, a folder or a file, in one of four formats, with errors that name their place.

The formats are TRL's, and the questions and answers of GSM8K. What a row says is not changed here, but for SVAMP,
whose problems come with equations in place of answers. Tokens are the matter of `recipes/tokens.py`.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable
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
from eval.task_files import KINDS
from recipes.config import did_you_mean

COLUMNS = ("question", "answer")
SVAMP_COLUMNS = ("Body", "Question", "Equation", "Answer")
FORMATS = {
    "SVAMP": SVAMP_COLUMNS,
    "question / answer": COLUMNS,
    "messages": ("messages",),
    "prompt / completion": ("prompt", "completion"),
    "text": ("text",),
}
TURNS = ("messages", "prompt", "completion")  # columns that may be lists of turns
BESIDE_TURNS = ("tools", "chat_template_kwargs")  # columns that a chat template is given with the turns
KNOWN_COLUMNS = [*dict.fromkeys(column for columns in FORMATS.values() for column in columns), *BESIDE_TURNS]
ROLES = ("system", "developer", "user", "assistant", "tool")
NUM_SVAMP_TRAIN = 700  # of 1,000, the rest is for testing, as on the Hub
TEXT_SUFFIXES = (".json", ".jsonl", ".csv")
ADVICE = f"give one JSON object a line, with {'; or '.join(' and '.join(columns) for columns in FORMATS.values())}"


def load_rows(
    dataset: str,
    config_name: str | None = None,
    split: str = "train",
    columns: dict[str, str] | None = None,
) -> DatasetDict:
    """Load the rows to train on, as `train`, and the other splits of a data set: the Hub's, a folder's or a file's.

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
    splits = _load_splits(dataset, config_name, columns)
    if split not in splits:
        raise ValueError(f"{dataset} has the splits {', '.join(splits)}, but training needs one called {split}.")
    train = splits.pop(split)
    splits = DatasetDict({"train": train, **{name: rows for name, rows in splits.items() if name != "train"}})
    return _from_svamp(splits)


def _load_splits(dataset: str, config_name: str | None, columns: dict[str, str] | None) -> DatasetDict:
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
        read = {str(split): _read_split(files, str(split), columns) for split, files in data_files.items()}
        return DatasetDict(read)
    if is_file:
        _check_no_pattern(dataset)
    try:
        loaded = load_dataset("parquet", data_files=data_files) if is_file else load_dataset(dataset, config_name)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"{dataset} has no rows: {error}") from error
    return DatasetDict({name: _known_columns(dataset, rows, columns) for name, rows in loaded.items()})


def _read_split(paths: list[str], split: str, columns: dict[str, str] | None) -> Dataset:
    """Read JSON and CSV files, which are one split, as they are."""
    placed = [pair for path in paths for pair in _read_file(path)]
    placed = [(place, _rename(place, _object(place, row), columns)) for place, row in placed]
    names = _check_rows(placed)
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
                raise ValueError(
                    f"{place}: {name} holds NaN or a number of more than 64 bits, got {row[name]!r:.99}."
                )
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


def _known_columns(dataset: str, rows: Dataset, columns: dict[str, str] | None) -> Dataset:
    """Check the rows of a library's data set, and keep what is known of them."""
    place = f"{dataset}, split {rows.split}"
    if not len(rows):
        raise ValueError(f"{place} has no rows.")
    old_names = _rename(place, {name: name for name in rows.column_names}, columns)
    rows = rows.select_columns(list(old_names.values())).rename_columns({old: new for new, old in old_names.items()})
    wanted = FORMATS[format_of(place, rows.column_names)]
    _check_rows((f"{place}, row {number}", row) for number, row in enumerate(rows, start=1))
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


# ---- formats ----


def format_of(place: str, names: Iterable[str]) -> str:
    """Tell by its columns which of `FORMATS` a row has; `place` is for the message of an error.

    Raises:
        ValueError: it has none of them, or several.
    """
    names = list(names)
    found = [name for name, columns in FORMATS.items() if set(columns) <= set(names)]
    if not found:
        raise ValueError(f"{place} has the columns {', '.join(names)} and {_what_is_missing(names)}")
    if len(found) > 1 and found[0] not in ("SVAMP", "question / answer"):
        raise ValueError(
            f"{place} has the columns of several formats: {', '.join(found)}. Name those to use, such as "
            f"columns: {{{FORMATS[found[0]][0]}: {FORMATS[found[0]][0]}}}."
        )
    return found[0]


def _what_is_missing(names: list[str]) -> str:
    begun = [columns for columns in FORMATS.values() if set(columns) & set(names)]
    if begun:
        missing = [name for name in begun[0] if name not in names]
        others = [name for name in names if name not in KNOWN_COLUMNS]
        nearest = f" For {missing[0]}, {did_you_mean(missing[0], others)}" if others else ""
        return (
            f"lacks {', '.join(missing)}; rename its columns to {' and '.join(begun[0])} with columns: "
            f"{{its name: {missing[0]}}}.{nearest}"
        )
    formats = "; or ".join(" and ".join(columns) for columns in FORMATS.values())
    guess = f" For {names[0]}, {did_you_mean(names[0], KNOWN_COLUMNS)}" if names else ""
    return f"lacks those of any format: {formats}. Rename them with columns: {{its name: known name}}.{guess}"


def _check_rows(placed: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Check that all rows are of one format and in order; return their columns."""
    first_place, wanted, beside = "", "", set()
    for place, row in placed:
        found = format_of(place, row)
        CHECKS[found](place, row)
        found += " of turns" * isinstance(row.get("prompt"), list)
        first_place, wanted = first_place or place, wanted or found
        if found != wanted:
            raise ValueError(
                f"{place} is of the format {found}, and {first_place} of {wanted}: a file must have one format. Give "
                "each a file of its own, and both as a mixture."
            )
        beside |= {name for name in BESIDE_TURNS if row.get(name) is not None}
    return [*FORMATS[wanted.removesuffix(" of turns")], *(name for name in BESIDE_TURNS if name in beside)]


def _check_texts(*columns: str) -> Callable[[str, dict[str, Any]], None]:
    def check(place: str, row: dict[str, Any]) -> None:
        for name in columns:
            if not isinstance(row[name], str):
                raise ValueError(f"{place}: {name} must be text, got {row[name]!r:.60}.")

    return check


def _check_svamp(place: str, row: dict[str, Any]) -> None:
    _check_texts("Body", "Question", "Equation")(place, row)
    if not KINDS["a number"](row["Answer"]):
        raise ValueError(f"{place}: Answer must be a number, got {row['Answer']!r:.60}.")


def _check_messages(place: str, row: dict[str, Any]) -> None:
    check_turns(f"{place}: messages", row["messages"])
    _check_beside(place, row)


def _check_completion(place: str, row: dict[str, Any]) -> None:
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        _check_texts("prompt", "completion")(place, row)
        return
    check_turns(f"{place}: prompt", row["prompt"])
    check_turns(f"{place}: completion", row["completion"])
    _check_beside(place, row)
    if row["prompt"][-1]["role"] == "assistant" or row["completion"][0]["role"] != "assistant":
        raise ValueError(
            f"{place}: a completion begins with a turn of the assistant, and a prompt ends with another's; got "
            f"{row['completion'][0]['role']} after {row['prompt'][-1]['role']}. Give whole conversations as messages."
        )


def _check_beside(place: str, row: dict[str, Any]) -> None:
    """Check what a chat template is given with the turns."""
    if not isinstance(row.get("chat_template_kwargs") or {}, dict):
        raise ValueError(f"{place}: chat_template_kwargs must be a mapping, got {row['chat_template_kwargs']!r:.60}.")
    try:
        tools = tools_of(row) or []
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: tools is not valid JSON: {error}.") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{place}: tools must be a list of descriptions, got {row['tools']!r:.60}.")


def tools_of(row: dict[str, Any]) -> Any:
    """The tools of a row; TRL's data sets have them as JSON, too."""
    tools = row.get("tools") or None
    return json.loads(tools) if isinstance(tools, str) else tools


def check_turns(place: str, turns: Any) -> None:
    """Check that something is a list of turns, each of a known role and with a text.

    Raises:
        ValueError: it is not; the message begins with `place`.
    """
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place} must be a list of turns, got {turns!r:.60}.")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "role" not in turn:
            raise ValueError(f"{place}: turn {number} must have a role and a content, got {turn!r:.60}.")
        if turn["role"] not in ROLES:
            raise ValueError(f"{place}: turn {number} has the role {turn['role']!r}; {_nearest_role(turn['role'])}")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise ValueError(
                f"{place}: the content of turn {number} must be text, got {turn.get('content')!r:.60}; pictures and "
                "other parts are not read."
            )


def _nearest_role(role: Any) -> str:
    known = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
    return f"write {known[role]}." if isinstance(role, str) and role in known else did_you_mean(role, ROLES)


CHECKS: dict[str, Callable[[str, dict[str, Any]], None]] = {
    "SVAMP": _check_svamp,
    "question / answer": _check_texts(*COLUMNS),
    "messages": _check_messages,
    "prompt / completion": _check_completion,
    "text": _check_texts("text"),
}


def is_conversation(rows: Dataset) -> bool:
    """Whether rows are lists of turns, as TRL's conversational formats are."""
    return isinstance(rows[0].get("messages", rows[0].get("prompt")), list)


# ---- what is held out ----


def hold_out(problems: DatasetDict, num_samples: int) -> DatasetDict:
    """Move the last `num_samples` training problems into a split of their own, `validation`.

    Raises:
        ValueError: none is left to train on.
    """
    num_train = len(problems["train"]) - num_samples
    if num_train < 1:
        raise ValueError(
            f"num_validation_samples={num_samples} leaves nothing to train on: there are {len(problems['train'])} "
            "training problems."
        )
    train, validation = (
        problems["train"].select(range(num_train)),
        problems["train"].select(range(num_train, num_train + num_samples)),
    )
    return DatasetDict({**problems, "train": train, "validation": validation})


def hold_out_fraction(problems: DatasetDict, fraction: float) -> DatasetDict:
    """Move a part of the training problems into `validation`, each by a hash of what it says.

    Where others are added or the order changes, a problem stays where it was; copies of one are on one side.

    Raises:
        ValueError: a side is empty.
    """
    rows = problems["train"]
    chosen = [_fraction_of(row) < fraction for row in rows]
    for side, is_empty in (("train on", all(chosen)), ("validate on", not any(chosen))):
        if is_empty:
            raise ValueError(
                f"validation_fraction={fraction} leaves nothing to {side} of {len(rows)} training problems: change it."
            )
    train = rows.select([number for number, is_held_out in enumerate(chosen) if not is_held_out])
    validation = rows.select([number for number, is_held_out in enumerate(chosen) if is_held_out])
    return DatasetDict({**problems, "train": train, "validation": validation})


def _fraction_of(row: dict[str, Any]) -> float:
    """A number between 0 and 1 that is the row's own."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
        _check_texts(*columns)(place, row)
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
