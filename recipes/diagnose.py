"""Measure how smooth the networks of finished runs are, beside one another.

    python -m recipes.diagnose runs/plain runs/dip runs/distilled --out runs/diagnosis
    python -m recipes.diagnose runs/plain runs/dip --out runs/diagnosis --instruments lipschitz curvature --split train

A run is the output folder of recipes/finetune.py or recipes/distill.py. A DIPNet run is two networks: with its noise
off, and the mean of k samples. All are measured on the same rows, which must be of one data set and tokenizer.
docs/diagnostics.md says what each instrument measures. The folder receives `diagnosis.json` and a table of its main
figures.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch.utils.data import DataLoader

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf.diagnostics import layer_places, lipschitz_constants
from recipes.data import make_collator, prepare_data
from recipes.finished_run import FinishedRun, load_network, read_run
from recipes.running import load_tokenizer, write_results
from report import provenance


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    args = parse_arguments(arguments)
    runs = {name_of(folder): read_run(folder) for folder in args.runs}
    if len(runs) < len(args.runs):
        raise ValueError(f"Two runs have one name among {', '.join(map(name_of, args.runs))}: rename a folder.")
    batches = common_batches(runs, args)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if name == "out" else value for name, value in vars(args).items()}
    results: dict[str, Any] = {"networks": {}, "provenance": provenance(__file__, settings, args.seed)}
    for name, run in runs.items():
        model = load_network(run)
        for label, answering in ways_to_answer(name, run, model, args):
            with answering:
                results["networks"][label] = {
                    instrument: INSTRUMENTS[instrument](model, batches, args) for instrument in args.instruments
                }
            write_results(args.out / "diagnosis.json", results)
            print(label, flush=True)


def name_of(folder: str) -> str:
    """A run's name: that of its folder."""
    return Path(folder).resolve().name


def common_batches(runs: dict[str, FinishedRun], args: argparse.Namespace) -> list[dict]:
    """The first rows of a split, which must be the same for all runs."""
    rows = {name: split_rows(run, args) for name, run in runs.items()}
    first, *others = rows
    for other in others:
        if rows[other].to_dict() != rows[first].to_dict():
            raise ValueError(f"The {args.split} rows of {first} and {other} differ: compare runs on one data set.")
    tokenizer = load_tokenizer(runs[first].config)
    return [dict(batch) for batch in DataLoader(rows[first], args.batch_size, collate_fn=make_collator(tokenizer))]


def split_rows(run: FinishedRun, args: argparse.Namespace) -> Dataset:
    """The first rows of a run's split, as tokens."""
    data = prepare_data(run.config, load_tokenizer(run.config))
    rows = data.train if args.split == "train" else data.heldout
    if rows is None:
        raise ValueError(f"{run.folder} has no test split: choose --split train.")
    return rows.select(range(min(args.limit, len(rows))))


def ways_to_answer(
    name: str, run: FinishedRun, model: Any, args: argparse.Namespace
) -> Iterator[tuple[str, AbstractContextManager]]:
    """The networks of a run: its label and the context in which the model answers for it."""
    if not run.has_noise:
        yield name, nullcontext()
        return
    yield f"{name}, noise off", model.deterministic()
    yield f"{name}, mean of {args.num_samples}", model.ensemble(args.num_samples, seed=args.seed)


# ---- instruments ----


def measure_lipschitz(model: Any, batches: list[dict], args: argparse.Namespace) -> dict[str, dict]:
    """The local Lipschitz constants at the embeddings and at some layers' inputs."""
    layers = layer_places(model)
    return {place: lipschitz_constants(model, batches[0], place)._asdict() for place in layers}


INSTRUMENTS: dict[str, Callable[[Any, list[dict], argparse.Namespace], Any]] = {"lipschitz": measure_lipschitz}
