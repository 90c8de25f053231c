"""The matrix: every property of every kind of site of every model that can be shrunk.

    python tests/matrix/run.py                       # all: tests/matrix/results.json and docs/matrix.md
    python tests/matrix/run.py --models llama vit    # these, anew, into runs/matrix alone

The first can be stopped and started again: a model that has a file in runs/matrix, made by this very code, is not run
again. Each model runs in a process of its own, with limits of time and memory, so that one that hangs or crashes is a
failed row and no more. The exit status is 1 where a cell has failed.
"""

import argparse
import collections
import functools
import hashlib
import json
import multiprocessing
import re
import resource
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: Python put tests/matrix/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import nn
from transformers.utils import logging

from report.output_folder import write_whole
from report.provenance import provenance
from tests.matrix.cases import Batch, Case, Network, NotAsked, Outcome, ask
from tests.matrix.other_models import ALL_SITES, OTHER_MODELS, build_other
from tests.matrix.properties import PROPERTIES
from tests.matrix.shrinking import build, causal_families

ROOT = Path(__file__).resolve().parents[2]
MAX_SECONDS = 900
MAX_BYTES = 12 * 2**30
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.matrix.run"])


# ---- one model ----


def make_batch(model: nn.Module) -> Batch:
    """Three rows for a causal language model, padded on the right, of which the first tokens have no label."""
    length = 2 * getattr(model.config, "local_attn_chunk_length", 6)  # Reformer trains on whole chunks
    ids = torch.randint(5, 180, (3, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length)
    mask = (positions < length - torch.arange(3)[:, None]).long()
    labels = ids.where(mask.bool() & (positions >= 3), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def make_network(name: str) -> Network:
    """Build a model by its name, of transformers' causal families or of `OTHER_MODELS`, and its batch.

    Raises:
        NotAsked: a causal family cannot be shrunk, or does not run without noise either.
    """
    if name in OTHER_MODELS:
        return Network(build_other(name), OTHER_MODELS[name].make_batch())
    try:
        model = build(name)
        batch = make_batch(model)
        with torch.no_grad():
            outputs = model(**batch)
        if not torch.isfinite(outputs.logits).all():
            raise ValueError("its logits are not finite")
    except Exception as error:
        raise NotAsked(textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")) from error
    return Network(model, batch)


def sites_of(name: str) -> dict[str, dict[str, str]]:
    """The kinds of sites of a model: what the table calls them, and the fields of the config."""
    sites = OTHER_MODELS[name].sites if name in OTHER_MODELS else ALL_SITES
    return {site: {"target_sites" if site in ALL_SITES else "target_modules": site} for site in sites}


def run_site(
    network: Network, sites: dict[str, str], properties: Iterable[Callable[[Case], None]] = PROPERTIES
) -> dict[str, Outcome]:
    """Ask the properties of one kind of site."""
    case = Case(network, sites)
    made = ask(lambda case: case.fresh and None, case)
    if made.kind != "ok":
        return {"is_made": made}
    return {"is_made": made} | {check.__name__: ask(check, case) for check in properties}


def run_model(name: str, folder: Path) -> None:
    """Ask every property of every kind of site of one model, and write a file."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    start = time.process_time()
    row: dict[str, Any] = {"code": code_version()}
    try:
        network = make_network(name)
    except NotAsked as reason:
        return _write(folder, name, row | {"not_built": str(reason)})
    sites = {site: run_site(network, fields) for site, fields in sites_of(name).items()}
    weights = network.weights if isinstance(network.weights, str) else "lora"
    row |= {"class": type(network.model).__name__, "weights": weights, "seconds": round(time.process_time() - start)}
    _write(folder, name, row | {"sites": sites})


def _write(folder: Path, name: str, row: dict[str, Any]) -> None:
    write_whole(folder / f"{name}.json", json.dumps(row, indent=1) + "\n")


@functools.cache
def code_version() -> str:
    """A hash of what a row depends on: this package, these files, and the versions of the libraries."""
    files = sorted([*(ROOT / "dipnet_hf").rglob("*.py"), *Path(__file__).parent.glob("*.py")])
    content = b"".join(file.read_bytes() for file in files)
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft")]
    return hashlib.sha256(content + " ".join(versions).encode()).hexdigest()[:16]


def is_done(path: Path) -> bool:
    """Whether a row has run with the code of now, to its end."""
    row = json.loads(path.read_text()) if path.exists() else {}
    return row.get("code") == code_version() and "failed" not in row


def run_in_own_process(name: str, folder: Path) -> None:
    """Run one model; one that ends by itself without a file, or does not end, has failed."""
    process = SERVER.Process(target=run_model, args=(name, folder))
    process.start()
    process.join(MAX_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        _write(folder, name, {"failed": f"not done after {MAX_SECONDS} seconds"})
    elif process.exitcode and not is_done(folder / f"{name}.json"):
        _write(folder, name, {"failed": f"its process ended with {process.exitcode}"})
    print(name, flush=True)


# ---- the table ----


def cells(rows: dict[str, dict]) -> list[tuple[str, str, str, Outcome]]:
    """All cells: model, site, property, outcome."""
    return [
        (model, site, name, Outcome(*outcome))
        for model, row in rows.items()
        for site, outcomes in row.get("sites", {}).items()
        for name, outcome in outcomes.items()
    ]


def failures(rows: dict[str, dict]) -> list[str]:
    """What has failed, a line each."""
    whole = [f"{model}: {row['failed']}" for model, row in rows.items() if "failed" in row]
    return whole + [f"{m} / {s} / {p}: {o.reason}" for m, s, p, o in cells(rows) if o.kind == "failed"]


def format_page(rows: dict[str, dict], origin: dict) -> str:
    """The page of the documentation: a row per model, and every reason once; `origin` is the provenance."""
    commit = (origin["git"] or {"commit": "unknown"})["commit"][:7]
    counts = collections.Counter(outcome.kind for *_, outcome in cells(rows))
    lines = [
        "# The matrix",
        "",
        "What was tried on which model: every causal architecture of the installed transformers, shrunk from its",
        "own default config, and other kinds of models, with noise at every kind of site. `make matrix` runs it and",
        "writes this page; every cell that is not right stands in `tests/matrix/results.json`.",
        "",
        f"**{counts['ok']:,} cells are right, {counts['refused']} refused, {counts['failed']} failed**; in",
        f"{counts['base']:,} the network cannot do it without noise either. Run with transformers",
        f"{origin['versions']['transformers']} at commit {commit}.",
        "",
        "## The properties",
        "",
        "| | |",
        "|---|---|",
        *(f"| `{check.__name__}` | {check.__doc__} |" for check in PROPERTIES),
        "",
        "## The models",
        "",
        "A cell is the number of properties that hold, that a model can be made among them. In brackets: those that",
        "were not asked, because the network lacks them without noise too. **Refused**: with a message (below). The",
        "weights are LoRA on all linear layers, or all weights where PEFT cannot train that.",
        "",
        f"| model | weights | {' | '.join(ALL_SITES)} | others |",
        "|---|---|" + "---|" * (len(ALL_SITES) + 1),
    ]
    built = {model: row for model, row in rows.items() if "sites" in row}
    for model, row in built.items():
        others = "; ".join(f"`{site}` {_cell(row, site)}" for site in row["sites"] if site not in ALL_SITES)
        columns = [model, row["weights"], *(_cell(row, site) for site in ALL_SITES), others]
        lines.append(f"| {' | '.join(columns)} |")
    lines += ["", "## What is refused", ""]
    lines += _reasons([(f"{m} ({s})", o.reason) for m, s, p, o in cells(rows) if o.kind == "refused"])
    lines += ["", "## What was not built", ""]
    lines += [f"* {model}: {row['not_built']}" for model, row in rows.items() if "not_built" in row]
    if failed := failures(rows):
        lines += ["", "## What has failed", "", *(f"* {line}" for line in failed)]
    return "\n".join(lines) + "\n"


def _cell(row: dict, site: str) -> str:
    kinds = collections.Counter(kind for kind, _ in row["sites"].get(site, {}).values())
    parts = [str(kinds["ok"])] if kinds else []
    parts += [f"({kinds['base']})"] if kinds["base"] else []
    parts += [f"**{kinds[kind]} {kind}**" for kind in ("refused", "failed") if kinds[kind]]
    return " ".join(parts)


def _reasons(cells: list[tuple[str, str]]) -> list[str]:
    """A line per reason, with the first of those that differ in their names and numbers only."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for place, reason in cells:
        by_kind.setdefault(re.sub(r"'[^']*'|[\d.]+|\w+(?=For|Block)", "", reason), []).append((place, reason))
    return [f"* {', '.join(dict.fromkeys(place for place, _ in same))}: {same[0][1]}" for same in by_kind.values()]


def _without_ok(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is committed: the cells that are not right."""
    sites = {
        site: {name: outcome for name, outcome in outcomes.items() if outcome[0] != "ok"}
        for site, outcomes in row.get("sites", {}).items()
    }
    return row | ({"sites": sites} if sites else {})


# ---- the program ----


def main(arguments: list[str] | None = None) -> int:
    """Run the models that have no file yet, and write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="these alone, anew; the committed results stay")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "matrix", help="a file per model")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args(arguments)
    known = [*causal_families(), *OTHER_MODELS]
    names = options.models or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown models {unknown}; the models are {known}")
    options.output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if options.models or not is_done(options.output / f"{name}.json")]
    with ThreadPool(options.jobs) as pool:
        pool.map(lambda name: run_in_own_process(name, options.output), missing, chunksize=1)
    rows = {name: json.loads((options.output / f"{name}.json").read_text()) for name in names}
    if not options.models:
        origin = provenance(__file__, {"properties": ["is_made", *(check.__name__ for check in PROPERTIES)]})
        results = {"provenance": origin, "not_ok": {name: _without_ok(row) for name, row in rows.items()}}
        write_whole(Path(__file__).with_name("results.json"), json.dumps(results, indent=1) + "\n")
        write_whole(ROOT / "docs" / "matrix.md", format_page(rows, origin))
    print("\n".join(failures(rows)) or "no cell has failed")
    return 1 if failures(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
