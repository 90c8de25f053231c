"""Where a result comes from: script, configuration, commit, machine, versions and seed."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("accelerate", "datasets", "dipnet_hf", "lm_eval", "peft", "torch", "transformers", "trl")


def provenance(script: str, config: dict, seed: int | None = None) -> dict:
    """Collect what a reader needs to judge or repeat a result.

    Args:
        script (`str`): the program's `__file__`; its folder tells which repository.
        config (`dict`): its resolved configuration, JSON-serializable.
        seed (`int`, *optional*): the seed of the run.

    Returns:
        `dict`: JSON-serializable. `git` is None outside a repository or without git.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "script": f"{Path(script).resolve().parent.name}/{Path(script).name}",
        "config": config,
        "seed": seed,
        "git": _git_state(Path(script).resolve().parent),
        "hardware": _hardware(),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Say which Python and which libraries are installed here; None for one that is not."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _git_state(folder: Path) -> dict | None:
    commit = _git(folder, "rev-parse", "HEAD")
    # Changed result files of other runs do not count as dirty: they do not affect this one.
    status = _git(folder, "status", "--porcelain", "--", ":/", ":(top,exclude)*/results/*")
    if commit is None or status is None:
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Run git in `folder`; None if it fails, as it does outside a repository."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _hardware() -> dict:
    has_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "ram_gib": _ram_gib(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "num_gpus": torch.cuda.device_count() if has_gpu else 0,
    }


def _cpu_model() -> str:
    """The CPU's name from Linux's /proc/cpuinfo; on other systems what Python knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


@cache
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
