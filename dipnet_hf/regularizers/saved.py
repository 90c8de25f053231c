"""The method that a finished run was trained with, where its answers need it."""

import json
from pathlib import Path

from torch import nn
from transformers.utils import cached_file

from . import METHODS
from .regularizer import CONFIG_NAME, STATE_NAME, Regularizer
from .samples import SampledRegularizer


def saved_method(run: str, revision: str | None = None) -> Regularizer | None:
    """Read the method of a run that answers otherwise, or by samples, with it; None where there is no such.

    Args:
        run (`str`): the folder or Hub id of a model or adapter.
        revision (`str`, *optional*): of a Hub id.

    Raises:
        ValueError: the method is none of this package.
    """
    path = _find(run, CONFIG_NAME, revision)
    if path is None:
        return None
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    name = values.pop("name")
    if name not in METHODS:
        raise ValueError(f"{run} was trained with {name}, which is no method of this package: attach it yourself.")
    method = METHODS[name](**values)
    return method if method.changes_network or isinstance(method, SampledRegularizer) else None


def attach_saved(model: nn.Module, run: str, revision: str | None = None) -> Regularizer | None:
    """Attach the method that a run answers with to its model, and take up what it has learned.

    Args:
        model (`nn.Module`): the run's model, just loaded.
        run, revision: see `saved_method`.

    Returns:
        `Regularizer`: what `saved_method` gives.

    Raises:
        ValueError: the method is none of this package.
    """
    method = saved_method(run, revision)
    if method is not None:
        _find(run, STATE_NAME, revision)  # beside the settings, where `load` looks for it
        method.attach(model)
        method.load(Path(str(_find(run, CONFIG_NAME, revision))).parent)
    return method


def _find(run: str, name: str, revision: str | None) -> str | None:
    if run.startswith((".", "/", "~")) or Path(run).is_dir():
        path = Path(run, name)
        return str(path) if path.is_file() else None
    return cached_file(
        run,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
