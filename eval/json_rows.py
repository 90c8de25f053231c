"""JSON Lines files and JSON arrays, read with the place of every row, so that an error can name it."""

import json
from pathlib import Path
from typing import Any


def read_rows(path: str, advice: str) -> list[tuple[str, Any]]:
    """Read the values of a JSON Lines file, or of a JSON array, each with its place for messages; a BOM is left out.

    Raises:
        ValueError: the file is missing or empty (`advice` says what to do), not UTF-8 or not JSON.
    """
    if not Path(path).is_file():
        raise ValueError(f"No data file at {path}; {advice}.")
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text: {error.reason}.") from error
    if text.lstrip().startswith("["):
        rows = [(f"{path}, item {number}", row) for number, row in enumerate(_parse_json(text, path, 1), start=1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [(f"{path}, line {number}", _parse_json(line, path, number)) for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty; {advice}.")
    return rows


def _parse_json(text: str, path: str, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise ValueError(f"{path}, line {first_line} or later is not JSON that can be read: {error}.") from error
