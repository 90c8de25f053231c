"""Measure how smooth the networks of finished runs are, beside one another.

    python -m recipes.diagnose runs/plain runs/dip runs/distilled --out runs/diagnosis
    python -m recipes.diagnose runs/plain runs/dip --out runs/diagnosis --instruments curvature plane --split train

A run is the output folder of recipes/finetune.py or recipes/distill.py. A DIPNet run is two networks: with its noise
off, and the mean of k samples. All are measured on the same rows, which must be of one data set and tokenizer.
docs/diagnostics.md says what each instrument measures. The folder receives `diagnosis.json`, which grows from network
to network, `table.txt` with its main figures, and pictures.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from torch import nn
from torch.utils.data import DataLoader

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf.card import read_noise
from dipnet_hf.diagnostics import (
    Curvature,
    attack_robustness,
    disagreement,
    layer_places,
    learned_noise,
    lipschitz_constants,
    loss_line,
    loss_plane,
    noise_robustness,
    scores,
    top_eigenvalues,
    trace,
    weight_robustness,
)
from recipes.arguments import positive
from recipes.data import choose_chat, first_rows, heldout_set, make_collator, prepare_data
from recipes.finished_run import FinishedRun, load_network, read_run
from recipes.rows import load_rows
from recipes.running import load_tokenizer, write_results
from recipes.tokens import tokenize
from report import draw_diagnosis, format_diagnosis, provenance
from report.output_folder import write_whole

RADII = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
NUM_DRAWS = 2  # of noise, per radius
PGD_STEPS = 5
NUM_PLACES = 3  # at which Lipschitz constants are measured: the embeddings and layers evenly over the depth
NUM_ITERATIONS = 6  # of a Lipschitz constant
NUM_VECTORS = 4  # of a trace
PLANE = tuple(number / 10 for number in range(-3, 4))
LINE = tuple(number / 10 for number in range(-2, 13))


class Rows(NamedTuple):
    """What all networks are measured on."""

    batches: list[dict]
    whole: dict  # all rows in one batch
    shifted: list[dict] | None  # problems from elsewhere


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    args = parse_arguments(arguments)
    runs = {Path(folder).resolve().name: read_run(folder) for folder in args.runs}
    if len(runs) < len(args.runs):
        raise ValueError(f"Two runs have one name: rename a folder of {', '.join(args.runs)}.")
    rows = common_rows(runs, args)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results: dict[str, Any] = {"provenance": provenance(__file__, settings, args.seed), "runs": {}, "networks": {}}
    for name, run in runs.items():
        results["runs"][name] = {"weights": run.config.weights, "dip": run.config.dip, "distilled": run.is_distilled}
        model = load_network(run)
        if run.has_noise:
            noise = learned_noise(read_noise(run.folder), model.init_noise_std)
            results["runs"][name]["learned_noise"] = plain(noise)
        for label, answering in ways_to_answer(name, run, model, args):
            print(f"{label} ...", flush=True)
            with answering:
                results["networks"][label] = measure(model, rows, args)
            if run.has_noise and "disagreement" in args.instruments and not model.in_ensemble:
                found = disagreement(model, rows.batches, args.num_samples, args.seed)
                results["runs"][name]["disagreement"] = plain({**found._asdict(), "auroc": found.auroc()})
            write_results(args.out / "diagnosis.json", results)
    if "line" in args.instruments and len(runs) > 1:
        try:
            results["lines"] = plain(measure_lines(runs, rows))
        except ValueError as error:  # a method has given one of them more parameters
            print(f"No line between these runs. {error}")
        write_results(args.out / "diagnosis.json", results)
    table = format_diagnosis(results)
    write_whole(args.out / "table.txt", f"{table}\n")
    print(table)
    for path in draw_diagnosis(results, args.out):
        print(path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the files")
    every = [*INSTRUMENTS, *OTHER_INSTRUMENTS]
    parser.add_argument(
        "--instruments", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every)
    )
    parser.add_argument("--split", choices=["test", "train"], default="test", help="whose rows (test)")
    parser.add_argument("--limit", type=positive, default=16, metavar="n", help="the first n rows (16)")
    parser.add_argument("--batch-size", type=positive, default=4, metavar="n", help="rows a pass, times k (4)")
    parser.add_argument("--num-samples", type=positive, default=4, metavar="k", help="samples of a DIPNet's mean (4)")
    parser.add_argument("--num-tokens", type=positive, default=16, metavar="n", help="for Lipschitz constants (16)")
    parser.add_argument(
        "--radii", nargs="+", type=float, default=RADII, metavar="r", help=f"of disturbances ({RADII})"
    )
    parser.add_argument("--shift", metavar="FILE", help="rows from elsewhere: a file of one of the formats")
    parser.add_argument("--seed", type=int, default=0, help="of noise, directions and samples (0)")
    return parser.parse_args(arguments)


# ---- rows and networks ----


def common_rows(runs: dict[str, FinishedRun], args: argparse.Namespace) -> Rows:
    """The first rows of a split, which must be the same for all runs, and those of a shifted file."""
    found = {name: split_rows(run, args) for name, run in runs.items()}
    (name, (rows, shifted)), *others = found.items()
    for other, (other_rows, _) in others:
        if other_rows.to_dict() != rows.to_dict():
            raise ValueError(f"The {args.split} rows of {name} and {other} differ: compare runs on one data set.")
    collator = make_collator(load_tokenizer(runs[name].config))

    def batches_of(rows: Dataset, batch_size: int) -> list[dict]:
        return [dict(batch) for batch in DataLoader(rows, batch_size, collate_fn=collator)]

    return Rows(
        batches_of(rows, args.batch_size),
        batches_of(rows, len(rows))[0],
        None if shifted is None else batches_of(shifted, args.batch_size),
    )


def split_rows(run: FinishedRun, args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """The first rows of a run's split and of the shifted file, as tokens."""
    tokenizer = load_tokenizer(run.config)

    def tokens_of(file: str) -> Dataset:
        rows = first_rows(load_rows(file)["train"], args.limit)
        chat = choose_chat(run.config, [DatasetDict(train=rows)])
        return heldout_set(tokenize(rows, tokenizer, chat), run.config.max_length)[0]

    if args.split == "train":
        rows = first_rows(prepare_data(run.config, tokenizer).train, args.limit)
    elif run.heldout.is_file():
        rows = tokens_of(str(run.heldout))
    else:
        raise ValueError(f"{run.folder} held nothing out ({run.heldout}): choose --split train.")
    return rows, None if args.shift is None else tokens_of(args.shift)


def ways_to_answer(
    name: str, run: FinishedRun, model: Any, args: argparse.Namespace
) -> Iterator[tuple[str, AbstractContextManager]]:
    """The networks of a run: its label, and the context in which the model answers for it."""
    if not run.has_noise:
        yield name, nullcontext()
        return
    yield f"{name}, noise off", model.deterministic()
    mean = "one draw" if args.num_samples == 1 else f"mean of {args.num_samples}"
    yield f"{name}, {mean}", model.ensemble(args.num_samples, seed=args.seed)


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """What a run had trained of its network's own weights; the variances of the noise are none."""
    return [weight for name, weight in model.named_parameters() if weight.requires_grad and ".dip_" not in name]


# ---- instruments ----


def measure(model: Any, rows: Rows, args: argparse.Namespace) -> dict[str, Any]:
    """Read off the instruments that look at one network."""
    found = {"scores": plain(scores(model, rows.batches))}
    if rows.shifted is not None:
        found["shifted_scores"] = plain(scores(model, rows.shifted))
    return found | {
        name: plain(instrument(model, rows, args))
        for name, instrument in INSTRUMENTS.items()
        if name in args.instruments
    }


def measure_lipschitz(model: Any, rows: Rows, args: argparse.Namespace) -> dict:
    """Local Lipschitz constants at the embeddings, and at layers evenly over the depth."""
    layers = layer_places(model)
    chosen = [layers[number] for number in torch.linspace(0, len(layers) - 1, NUM_PLACES).round().int().tolist()]
    places = ["embeddings", *(layer for layer in dict.fromkeys(chosen) if layer != layers[0])]  # its input is theirs
    return {
        place: lipschitz_constants(model, rows.whole, place, args.num_tokens, NUM_ITERATIONS, seed=args.seed)
        for place in places
    }


def measure_curvature(model: Any, rows: Rows, args: argparse.Namespace) -> dict:
    """Top eigenvalue and trace of the Hessian, and the top eigenvalue of the GGN, by the trained weights."""
    hessian, ggn = (Curvature(model, trained_weights(model), rows.batches, matrix) for matrix in ("hessian", "ggn"))
    return {
        "hessian_top": top_eigenvalues(hessian, seed=args.seed)[0],
        "ggn_top": top_eigenvalues(ggn, seed=args.seed)[0],
        "hessian_trace": trace(hessian, NUM_VECTORS, args.seed),
        "num_products": {"hessian": hessian.num_products, "ggn": ggn.num_products},
    }


def measure_noise(model: Any, rows: Rows, args: argparse.Namespace) -> dict:
    """The loss under noise in the embeddings, at every layer, and in the trained weights."""
    every = ["embeddings"], layer_places(model)
    embeddings, layers = (
        noise_robustness(model, rows.batches, args.radii, places, NUM_DRAWS, args.seed) for places in every
    )
    weights = weight_robustness(model, trained_weights(model), rows.batches, args.radii, NUM_DRAWS, args.seed)
    return {"embedding_noise": embeddings, "layer_noise": layers, "weight_noise": weights}


def measure_attack(model: Any, rows: Rows, args: argparse.Namespace) -> dict:
    """The loss under attacks on the embeddings."""
    return {
        "fgsm": attack_robustness(model, rows.batches, args.radii),
        "pgd": attack_robustness(model, rows.batches, args.radii, PGD_STEPS),
    }


def measure_plane(model: Any, rows: Rows, args: argparse.Namespace) -> dict:
    """The loss on a plane through the trained weights."""
    return {"steps": PLANE, "loss": loss_plane(model, trained_weights(model), rows.batches, PLANE, args.seed)}


INSTRUMENTS: dict[str, Callable[[Any, Rows, argparse.Namespace], dict]] = {
    "lipschitz": measure_lipschitz,
    "curvature": measure_curvature,
    "noise": measure_noise,
    "attack": measure_attack,
    "plane": measure_plane,
}
OTHER_INSTRUMENTS = ("disagreement", "line")  # which look at a DIPNet's samples, and at two runs


def measure_lines(runs: dict[str, FinishedRun], rows: Rows) -> dict[str, Any]:
    """The loss on the lines from the first run's plain network to the others'."""
    first, *others = runs
    model = plain_network(runs[first])
    return {"fractions": LINE} | {
        f"{first} to {other}": loss_line(
            model, dict(plain_network(runs[other]).named_parameters()), rows.batches, LINE
        )
        for other in others
    }


def plain_network(run: FinishedRun) -> nn.Module:
    """A run's network without noise and adapters."""
    model = load_network(run)
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def plain(value: Any) -> Any:
    """Turn tensors and named tuples into what JSON holds, numbers to five digits."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
