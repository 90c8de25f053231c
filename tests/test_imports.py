"""Who may import whom, read from the source, and what `import dipnet_hf` must not do.

`TABLE` has a row for every file of the library, or for its folder: a new file fails until it has one.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "dipnet_hf"
PROGRAMS = {"benchmarks", "eval", "recipes", "report", "tests"}
STEMS = sorted(path.relative_to(LIBRARY).with_suffix("").as_posix() for path in LIBRARY.rglob("*.py"))


class Row(NamedTuple):
    """What a file may import, names separated by spaces; a folder's own files are always allowed to it.

    `ours` are files and folders of the library by stem; "public" is what `from dipnet_hf import ...` offers.
    """

    ours: str = ""
    others: str = ""
    lazy: str = ""  # of either kind, only inside a function


TABLE = {
    # The maths: testable without PEFT or transformers.
    "noise": Row(others="torch", lazy="kernels"),
    "layout": Row(others="torch"),
    "draws": Row(ours="layout noise", others="torch"),
    "objective": Row(others="torch"),
    "chunked_loss": Row(ours="objective", others="torch"),
    "batches": Row(others="torch"),
    "contexts": Row(others="torch"),
    "modes": Row(others="torch"),
    "sharding": Row(others="torch", lazy="deepspeed"),
    "uncertainty": Row(others="numpy torch"),
    "kernels": Row(others="torch triton"),
    # What is asked of a network, and what is done to its forward pass.
    "architecture": Row(ours="chunked_loss sharding", others="peft torch transformers"),
    "late_expansion": Row(ours="architecture contexts", others="torch"),
    "hidden_states": Row(ours="architecture chunked_loss contexts sharding", others="torch"),
    "data_loss": Row(ours="batches chunked_loss hidden_states objective", others="torch"),
    # The tuner. Saving a config writes the folder's card, which states the package's version.
    "card": Row(others="huggingface_hub peft safetensors"),
    "config": Row(ours="card", others="peft", lazy="public"),
    "projection": Row(ours="config contexts draws layout sharding", others="peft torch"),
    "sites": Row(ours="architecture config projection sharding", others="peft torch"),
    "scale": Row(ours="architecture batches layout projection", others="torch"),
    "calibration_loss": Row(
        ours="architecture batches data_loss hidden_states scale sharding", others="accelerate torch"
    ),
    "calibration": Row(ours="calibration_loss config modes projection scale sharding", others="torch"),
    "weights": Row(ours="config", others="peft safetensors torch"),
    "passes": Row(ours="architecture draws late_expansion layout noise projection", others="torch"),
    "sampled_rows": Row(ours="architecture contexts late_expansion", others="torch transformers"),
    "ensemble": Row(
        ours="architecture draws late_expansion layout noise projection sampled_rows uncertainty",
        others="peft torch",
    ),
    "generation": Row(ours="contexts sampled_rows", others="torch transformers"),
    "model": Row(
        ours="architecture calibration calibration_loss config contexts draws ensemble generation hidden_states "
        "late_expansion layout noise objective passes projection sampled_rows sharding sites weights",
        others="peft safetensors torch transformers",
    ),
    "registry": Row(ours="config model", others="peft"),
    # What uses it.
    "loss": Row(ours="architecture batches config data_loss hidden_states objective", others="accelerate torch"),
    "trl_trainers": Row(ours="batches config"),
    "logvar_groups": Row(ours="sharding", others="torch"),
    "replay": Row(others="torch"),
    "trainer": Row(
        ours="architecture batches config logvar_groups loss model objective progress replay sharding trl_trainers",
        others="accelerate peft torch transformers",
    ),
    "progress": Row(others="transformers"),
    "generation_callback": Row(ours="architecture modes", others="torch transformers"),
    "sft_trainer": Row(ours="trainer trl_trainers", others="torch transformers trl"),
    "regularizers": Row(
        ours="architecture batches config contexts ensemble generation logvar_groups modes noise sampled_rows trainer "
        "uncertainty",
        others="peft safetensors torch transformers",
    ),
    "axolotl": Row(ours="config trainer", others="axolotl peft pydantic"),
    "answers": Row(others="lm_eval torch"),
    "responses": Row(ours="answers", others="lm_eval"),
    "lm_eval_model": Row(
        ours="answers ensemble model noise regularizers responses sampled_rows",
        others="lm_eval peft torch transformers",
    ),
    "diagnostics": Row(ours="architecture batches modes public uncertainty", others="numpy peft torch", lazy="scipy"),
    # transformers.Trainer imports datasets, and trl everything: only who asks for a trainer pays for it.
    "__init__": Row(
        ours="config ensemble loss model objective registry", lazy="generation_callback sft_trainer trainer"
    ),
}


class Import(NamedTuple):
    """One imported name: a stem of the library, "public", or the top-level name of another distribution."""

    name: str
    ours: bool
    lazy: bool
    line: int


def resolve(module: str, names: list[str], lazy: bool, line: int) -> list[Import]:
    """Say what `from module import names` reaches; `module` is absolute, `names` is empty for `import module`."""
    top, *inner = module.split(".")
    if top != LIBRARY.name:
        return [Import(top, False, lazy, line)]
    if inner:
        return [Import(inner[0], True, lazy, line)]
    return [Import(name if name in STEMS or name in TABLE else "public", True, lazy, line) for name in names or [""]]


def imports(source: str, package: str = LIBRARY.name) -> list[Import]:
    """List the imports in `source`, a file of `package`: statements, and calls of `import_module` with a literal."""
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.extend(resolve(alias.name, [], lazy, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.extend(resolve(module, [alias.name for alias in node.names], lazy, node.lineno))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__"):
                name = str(node.args[0].value)
                name = package + name if name.startswith(".") else name
                found.extend(resolve(name, [], lazy, node.lineno))
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), lazy=False)
    return found


def find_row(stem: str) -> Row | None:
    """Find the row of a file, or of its folder: `kernels/projection` -> `kernels`."""
    return TABLE.get(stem, TABLE.get(stem.split("/")[0]))


def violations(stem: str, row: Row, found: list[Import]) -> list[str]:
    """List the imports that the row does not allow."""
    folder = {stem.split("/")[0]} if "/" in stem else set()
    problems = []
    for entry in found:
        eager = folder | set(row.ours.split()) if entry.ours else sys.stdlib_module_names | set(row.others.split())
        if entry.name in eager or (entry.lazy and entry.name in row.lazy.split()):
            continue
        rule = "allows only inside a function" if entry.name in row.lazy.split() else "does not allow"
        problems.append(f"{stem}.py:{entry.line} imports {entry.name}, which its row in TABLE {rule}")
    return problems


def imports_of(stem: str) -> list[Import]:
    """List the imports of one file of the library."""
    package = ".".join([LIBRARY.name, *stem.split("/")[:-1]])
    return imports((LIBRARY / f"{stem}.py").read_text(), package)


@pytest.mark.parametrize("stem", STEMS)
def test_file_follows_the_table(stem):
    row = find_row(stem)
    assert row is not None, f"{stem}.py is new: say in TABLE what it may import"
    found = imports_of(stem)
    assert not violations(stem, row, found)
    assert not PROGRAMS & {entry.name for entry in found}


@pytest.mark.parametrize("name", TABLE)
def test_a_row_allows_what_its_files_import_and_no_more(name):
    files = [stem for stem in STEMS if stem == name or stem.startswith(f"{name}/")]
    assert files, f"TABLE has a row for {name}, and the library has no such file"
    found = [entry for stem in files for entry in imports_of(stem)]
    used = {entry.name for entry in found if not entry.lazy}
    row = TABLE[name]
    assert not {*row.ours.split(), *row.others.split()} - used
    assert not set(row.lazy.split()) - {entry.name for entry in found if entry.lazy}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.nn as nn", ("torch", False, False)),
        ("from peft.utils import a", ("peft", False, False)),
        ("from . import config", ("config", True, False)),
        ("from . import __version__", ("public", True, False)),
        ("from .config import DipConfig", ("config", True, False)),
        ("from dipnet_hf import DipConfig", ("public", True, False)),
        ("import dipnet_hf", ("public", True, False)),
        ("import dipnet_hf.kernels.projection", ("kernels", True, False)),
        ("def f():\n    from .config import DipConfig", ("config", True, True)),
        ("class A:\n    import trl", ("trl", False, False)),
        ("if True:\n    import trl", ("trl", False, False)),
        ("importlib.import_module('trl.trainer')", ("trl", False, False)),
        ("def f():\n    import_module('.config')", ("config", True, True)),
    ],
)
def test_imports_are_seen(source, expected):
    assert [tuple(entry)[:3] for entry in imports(source)] == [expected]


def test_relative_imports_of_a_folder_are_seen():
    found = imports("from .projection import a\nfrom ..model import b\nfrom .. import DipConfig", "dipnet_hf.kernels")
    assert [entry.name for entry in found] == ["kernels", "model", "public"]


def test_violations_are_reported():
    row = Row(ours="noise", others="torch", lazy="kernels")
    found = imports(
        "import math, torch, trl\nfrom . import noise, model, kernels\ndef f():\n    from . import kernels"
    )
    assert violations("a", row, found) == [
        "a.py:1 imports trl, which its row in TABLE does not allow",
        "a.py:2 imports model, which its row in TABLE does not allow",
        "a.py:2 imports kernels, which its row in TABLE allows only inside a function",
    ]


def test_every_file_of_the_library_has_a_test_file_of_its_stem():
    """One folder's tests may lie in one file."""
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    names = {stem.split("/")[0] for stem in STEMS} - {"__init__"}
    assert {f"test_{name}" for name in names} <= tests


def test_what_several_tests_need_is_in_no_test_file():
    """It is in `helpers`, in `tiny_models` or in a `conftest`."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not re.search(r"\btests\b.*\btest_", ast.unparse(node)), f"{path.name}:{node.lineno}"


# Runs in a fresh interpreter. PEFT's own imports do not count: it loads bitsandbytes, and that loads triton on CUDA.
PROBE = """
import json, random, sys
import numpy, torch, peft

def random_states():
    return random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.initial_seed()

events = []
sys.addaudithook(lambda event, args: events.append(event))
before, states = set(sys.modules), random_states()
events.clear()

import dipnet_hf

connections = sorted({event for event in events if event in ("socket.connect", "socket.getaddrinfo")})
print(json.dumps({
    "imported": sorted({"datasets", "lm_eval", "matplotlib", "triton", "trl"} & (set(sys.modules) - before)),
    "network": connections,
    "cuda_initialized": torch.cuda.is_initialized(),
    "random_state_kept": random_states() == states,
}))
"""


def test_importing_the_library_touches_nothing_else():
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "imported": [],
        "network": [],
        "cuda_initialized": False,
        "random_state_kept": True,
    }
