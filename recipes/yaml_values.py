"""A YAML file as plain values, some of them overridden by `key=value`, and the check that every key is known."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path

import yaml


def read_values(path: str, overrides: Sequence[str]) -> dict:
    """Read a file's mapping, and set the dotted keys of `overrides`, whose values are YAML.

    Raises:
        ValueError: the file is missing or not a mapping, or an override is malformed.
    """
    if not Path(path).is_file():
        raise ValueError(f"No configuration file at {path}; those of this repository are in recipes/configs/.")
    values = _parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines, got {type(values).__name__}.")
    for override in overrides:
        _apply_override(values, override)
    return values


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` that reads `1e-4` as a number, as YAML 1.2 does; YAML 1.1 wants `1.0e-4`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, source: str):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def _apply_override(values: dict, override: str) -> None:
    """Set one dotted `key=value` in `values`, making the sections that are not there."""
    key, separator, text = override.partition("=")
    if not (key and separator):
        raise ValueError(f"--set takes key=value, got {override!r}; write for instance training.learning_rate=1e-4.")
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, start=1):
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(
                f"--set {override}: {'.'.join(sections[:depth])} is {values!r} and has no keys; "
                f"replace it as a whole with --set '{'.'.join(sections[:depth])}={{...}}'."
            )
    values[name] = _parse_yaml(text, f"--set {override}")


def check_keys(section: str, given: dict, allowed: set[str]) -> None:
    """Raise a `ValueError` that names the nearest allowed keys when `given` holds another one."""
    prefix = f"{section}." if section else ""
    if not isinstance(given, dict):
        raise ValueError(f"{section} must hold `key: value` lines, got {given!r}.")
    for key in given:
        if key not in allowed:
            raise ValueError(f"Unknown key {prefix}{key}; {did_you_mean(key, allowed, prefix)}")


def did_you_mean(given, allowed: Iterable[str], prefix: str = "") -> str:
    """Name the nearest of the allowed names, or all of them."""
    nearest = get_close_matches(str(given), sorted(allowed), n=3, cutoff=0.4)
    names = ", ".join(prefix + name for name in nearest or sorted(allowed))
    return f"did you mean {names}?" if nearest else f"allowed are {names}."


def field_names(config_class: type) -> set[str]:
    """The keys that a dataclass can be made with."""
    return {item.name for item in fields(config_class) if item.init}
