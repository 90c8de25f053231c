"""The folder that a run writes to: of one run at a time, and without a file that is not whole under its final name."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open


@contextmanager
def occupied(folder: str | os.PathLike) -> Iterator[None]:
    """Occupy a folder, which is made if it is not there, until the context or the process ends.

    Of the processes of one run only the first, by the environment variable `RANK`, takes the lock.

    Raises:
        ValueError: another run, in this process or in another, writes to the folder now.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run writes to {folder} now. Wait for its end, stop it, or choose another folder for this run."
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its final name, and rename it when it is whole.

    Raises:
        OSError: the disk is full, or the folder cannot be written to. A file that was at `path` is as it was.
    """
    beside = path.with_name(f"{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not say its file
    os.replace(beside, path)


def check_files(folder: str | os.PathLike) -> None:
    """Read the JSON files of a folder, and the headers of its weights, which tell their size.

    Raises:
        ValueError: a file was cut, or holds something else than its name says.
    """
    for path in sorted(Path(folder).iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (ValueError, SafetensorError) as error:
            raise ValueError(
                f"{path} is broken, or was not written to its end: {error}. Restore or delete it."
            ) from error
