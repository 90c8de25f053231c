"""Keeps the responses of a long evaluation in a file, so that a rerun does not compute them again."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.model import CacheHook, hash_args

from .answers import Answer


class Responses(CacheHook):
    """Finished responses, one JSON line each in `<folder>/responses.jsonl`; a rerun takes them from there.

    The harness' own cache uses pickle, and gives the same answer to all repeats of a request. Here a line holds the
    hash of a request, the sample that answered it, and the response; a written one has its tokens and those of its
    prompt. The first line holds the run's fingerprint. Of several processes, process n > 0 writes to
    `responses-<n>.jsonl`. Each reads all files, so that a rerun may use another number of processes.

    Args:
        folder (`str`): created if it does not exist.
        fingerprint (`dict`): what the responses depend on besides the requests, JSON-serializable.

    Raises:
        ValueError: the folder holds responses under another fingerprint, or a broken line. A last line that was torn
            by a killed process is dropped.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: dict[str, Any]) -> None:
        super().__init__(None)
        self.sample: int | None = None  # which one answers now, in a vote
        self._finished: dict[tuple[str, int | None], list] = defaultdict(list)
        self._fingerprint = json.loads(json.dumps(fingerprint))
        for path in sorted(Path(folder).glob("responses*.jsonl")):
            self._read(path)
        rank = int(os.environ.get("RANK", "0"))
        self._path = Path(folder) / ("responses.jsonl" if rank == 0 else f"responses-{rank}.jsonl")
        self._file: TextIO | None = None  # opened with the first response: a run that fails earlier leaves none

    def take(self, kind: str, args: tuple) -> Any:
        """Take a finished response to a request; each is given once, and None if none is left."""
        finished = self._finished[hash_args(kind, args), self.sample]
        response = finished.pop(0) if finished else None
        return tuple(response) if isinstance(response, list) else response  # JSON has no tuples

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        """Write one response; the harness calls this as soon as its batch is done."""
        tokens = {"prompt": res.prompt, "tokens": res.tokens} if isinstance(res, Answer) else {}
        self._write({"request": hash_args(attr, req), "sample": self.sample, "response": res, **tokens})

    def _read(self, path: Path) -> None:
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                row = json.loads(line)
                if number > 1:
                    self._finished[row["request"], row["sample"]].append(_response(row))
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{path}, line {number} is broken: {error}. Remove it.") from error
            if number == 1:
                _check_fingerprint(path, row.get("fingerprint", {}), self._fingerprint)

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._file = self._open()
        self._file.write(json.dumps(row) + "\n")

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        lines = _whole_lines(self._path)
        # A last line that was torn would run into the next one.
        os.truncate(self._path, sum(len(line) + 1 for line in lines))
        file = open(self._path, "a", encoding="ascii", buffering=1)  # noqa: SIM115  (stays open)
        if not lines:
            file.write(json.dumps({"fingerprint": self._fingerprint}) + "\n")
        return file


def _response(row: dict[str, Any]) -> Any:
    if "tokens" not in row:
        return row["response"]
    return Answer(row["response"], row["prompt"], row["tokens"])


def _whole_lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").split("\n")[:-1]


def _check_fingerprint(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} holds the responses of another run: {'; '.join(changed)}. Choose another --output_path, or "
            "repeat that run's command to resume it."
        )
