"""The formats of rows: which columns and turns each has, and what is said of a row that has them not.

They are TRL's, and the questions and answers of GSM8K, of SVAMP and of AQuA-RAT.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from datasets import Dataset

from eval.task_files import KINDS
from recipes.yaml_values import did_you_mean

COLUMNS = ("question", "answer")
FORMATS = {
    "SVAMP": ("Body", "Question", "Equation", "Answer"),
    "question / answer": COLUMNS,
    "AQuA-RAT": ("question", "options", "correct"),
    "messages": ("messages",),
    "prompt / completion": ("prompt", "completion"),
    "text": ("text",),
}
TURNS = ("messages", "prompt", "completion")  # columns that may be lists of turns
BESIDE_TURNS = ("tools", "chat_template_kwargs")  # columns that a chat template is given with the turns
KNOWN_COLUMNS = [*dict.fromkeys(column for columns in FORMATS.values() for column in columns), *BESIDE_TURNS]
ROLES = ("system", "developer", "user", "assistant", "tool")


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
        chosen = ", ".join(f"{name}: {name}" for name in FORMATS[found[0]])
        raise ValueError(
            f"{place} has the columns of several formats: {', '.join(found)}. Name those to use, such as "
            f"columns: {{{chosen}}}."
        )
    return found[0]


def _what_is_missing(names: list[str]) -> str:
    nearest_format = max(FORMATS.values(), key=lambda columns: len(set(columns) & set(names)))
    missing = [name for name in nearest_format if name not in names]
    if len(missing) < len(nearest_format):
        others = [name for name in names if name not in KNOWN_COLUMNS]
        nearest = f" For {missing[0]}, {did_you_mean(missing[0], others)}" if others else ""
        return (
            f"lacks {', '.join(missing)}; rename its columns to {' and '.join(nearest_format)} with columns: "
            f"{{its name: {missing[0]}}}.{nearest}"
        )
    formats = "; or ".join(" and ".join(columns) for columns in FORMATS.values())
    guess = f" For {names[0]}, {did_you_mean(names[0], KNOWN_COLUMNS)}" if names else ""
    return f"lacks those of any format: {formats}. Rename them with columns: {{its name: known name}}.{guess}"


def check_rows(placed: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
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


def check_texts(*columns: str) -> Callable[[str, dict[str, Any]], None]:
    """Make the check that a row has text in these columns."""

    def check(place: str, row: dict[str, Any]) -> None:
        for name in columns:
            if not isinstance(row[name], str):
                raise ValueError(f"{place}: {name} must be text, got {row[name]!r:.60}.")

    return check


def _check_svamp(place: str, row: dict[str, Any]) -> None:
    check_texts("Body", "Question", "Equation")(place, row)
    if not KINDS["a number"](row["Answer"]):
        raise ValueError(f"{place}: Answer must be a number, got {row['Answer']!r:.60}.")


def _check_aqua(place: str, row: dict[str, Any]) -> None:
    check_texts("question", "correct")(place, row)
    if not KINDS["a list of text"](row["options"]):
        raise ValueError(f"{place}: options must be a list of text, got {row['options']!r:.60}.")
    letters = [option[:1] for option in row["options"]]
    if "" in letters or letters.count(row["correct"]) != 1:
        raise ValueError(
            f"{place}: correct must be the letter of one option, got {row['correct']!r} and {row['options']!r:.60}."
        )


def _check_messages(place: str, row: dict[str, Any]) -> None:
    check_turns(f"{place}: messages", row["messages"])
    if row["messages"][0]["role"] == "assistant":
        raise ValueError(f"{place}: nothing asks for the first turn, the assistant's: leave it out.")
    _check_beside(place, row)


def _check_completion(place: str, row: dict[str, Any]) -> None:
    if isinstance(row["prompt"], str) or isinstance(row["completion"], str):
        check_texts("prompt", "completion")(place, row)
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
    "question / answer": check_texts(*COLUMNS),
    "AQuA-RAT": _check_aqua,
    "messages": _check_messages,
    "prompt / completion": _check_completion,
    "text": check_texts("text"),
}


def is_conversation(rows: Dataset) -> bool:
    """Whether rows are lists of turns, as TRL's conversational formats are."""
    return isinstance(rows[0].get("messages", rows[0].get("prompt")), list)
