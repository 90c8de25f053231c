"""Pictures of finished runs: metrics by ensemble size, a text coloured by the ensemble's disagreement, calibration.

    python recipes/plots.py samples DIPNet=runs/seed0/results.json,runs/seed1/results.json --output pictures
    python recipes/plots.py tokens runs/stories260k-gsm8k-300 --output pictures
    python recipes/plots.py calibration plain=plain/samples_X.jsonl DIPNet=dip/samples_X.jsonl --output pictures

`samples` takes the results of recipes/distill.py, `tokens` the folder of a DIP run of recipes/finetune.py, and
`calibration` the samples that eval/run.py writes with --log_samples.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dipnet_hf import predict
from recipes.config import FinetuneConfig, load_config
from recipes.rows import read_json_lines, read_problems
from recipes.running import load_dip_run, load_tokenizer
from recipes.tokens import format_prompt
from report import (
    plot_against_samples,
    plot_reliability,
    plot_risk_coverage,
    plot_tokens,
    write_tokens_html,
)
from report.results import check_same_settings, read_results, split_groups

CURVES = {"nll": "NLL, nats per token", "accuracy": "accuracy of the likeliest token"}
METRICS = ("exact_match", "acc")  # entries of a sample that tell whether its answer is right


def main(arguments: list[str] | None = None) -> None:
    """Draw what the command line asks for."""
    args = parse_arguments(arguments)
    for path in args.draw(args):
        print(path)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; `draw` is the subcommand's function, which returns the paths it has written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder for the pictures")
    groups = argparse.ArgumentParser(add_help=False)
    groups.add_argument("groups", nargs="+", metavar="LABEL=FILE[,FILE...]", help="a group, with one file per seed")
    subcommands = parser.add_subparsers(required=True)

    samples = subcommands.add_parser("samples", parents=[common, groups], help="NLL and accuracy by ensemble size")
    samples.add_argument("--heldout", metavar="NAME", help="which of the runs' heldout_sizes")
    samples.set_defaults(draw=draw_samples)

    tokens = subcommands.add_parser("tokens", parents=[common], help="a text coloured by mutual information")
    tokens.add_argument("run", metavar="FOLDER", help="output folder of a DIP run")
    tokens.add_argument("--text", help="the text; the first held-out problem unless given")
    tokens.add_argument("--num-samples", type=int, default=8, metavar="k", help="samples (8)")
    tokens.set_defaults(draw=draw_tokens)

    calibration = subcommands.add_parser("calibration", parents=[common, groups], help="reliability and risk-coverage")
    calibration.add_argument("--filter", metavar="NAME", help="which of the task's filters")
    calibration.add_argument("--metric", choices=METRICS, help="what tells that an answer is right")
    calibration.add_argument("--num-bins", type=int, default=15, metavar="n", help="bins of the diagram (15)")
    calibration.add_argument("--binning", choices=["width", "mass"], default="width", help="equal widths or counts")
    calibration.set_defaults(draw=draw_calibration)
    return parser.parse_args(arguments)


def make_folder(folder: Path) -> Path:
    """Make the folder for the pictures, once there is something to draw."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- metrics by ensemble size ----


def draw_samples(args: argparse.Namespace) -> list[Path]:
    """Draw NLL and accuracy of noise off, ensembles and distilled networks against the number of samples."""
    rows = sample_rows(split_groups(args.groups), args.heldout)
    paths = {metric: make_folder(args.output) / f"{metric}-by-samples.png" for metric in CURVES}
    for metric, label in CURVES.items():
        plot_against_samples(rows, str(paths[metric]), metric, label)
    return list(paths.values())


def sample_rows(groups: dict[str, list[str]], heldout: str | None) -> list[dict]:
    """Collect the scores of distillations as `plot_against_samples` takes them.

    Raises:
        ValueError: a file is missing or not from a distillation, it has no such held-out size or several to choose
            from, or a group's runs differ in more than their seeds.
    """
    rows = []
    for label, files in groups.items():
        runs = {file: read_results(file) for file in files}
        check_same_settings(label, list(runs.values()))
        for file, results in runs.items():
            config = results["provenance"]["config"]
            for method, scores in scores_of(file, results, heldout).items():
                # A method is `ensemble_<k>`, or the name of an answer by one pass.
                kind, _, num_samples = method.partition("ensemble_")
                row = {"method": f"{label}, {(kind or 'ensemble').replace('_', ' ')}", **scores}
                seeds = (config["teacher_config"]["training"].get("seed"), results["provenance"]["seed"])
                rows.append({**row, "num_samples": int(num_samples) if num_samples else None, "seed": seeds})
    return rows


def scores_of(file: str, results: dict, heldout: str | None) -> dict[str, dict]:
    """Pick the scores of one held-out size, by method."""
    scores = results["scores"]
    if "distilled" not in scores:
        raise ValueError(f"{file} was not written by recipes/distill.py; it scores {', '.join(scores) or 'nothing'}.")
    names = list(scores["distilled"])
    if heldout is None and len(names) == 1:
        heldout = names[0]
    if heldout not in names:
        asked = "" if heldout is None else f"no held-out size {heldout}; it has "
        raise ValueError(f"{file} has {asked}{', '.join(names)}: choose by --heldout.")
    return {method: by_size[heldout] for method, by_size in scores.items()}


# ---- a text by mutual information ----


def draw_tokens(args: argparse.Namespace) -> list[Path]:
    """Colour a text's tokens by the mutual information of the ensemble's predictions of them."""
    run = load_run(args.run)
    if args.text is None and run.apply_chat_template:
        raise ValueError(f"{args.run} was trained in a chat template, which its problems are not in; give --text.")
    text = first_problem(args.run) if args.text is None else args.text
    model, tokenizer = load_dip_run(args.run, run), load_tokenizer(run)
    tokens, nats = token_information(model, tokenizer, text, run.max_length, args.num_samples)
    title = f"Mutual information of {args.num_samples} samples, nats by token"
    paths = [make_folder(args.output) / f"tokens.{ending}" for ending in ("png", "html")]
    for draw, path in zip((plot_tokens, write_tokens_html), paths, strict=True):
        draw(tokens, nats, str(path), title)
    return paths


def load_run(folder: str) -> FinetuneConfig:
    """Read the configuration of a DIP run."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter; give the output folder of a DIP run of recipes/finetune.py.")
    run = load_config(str(Path(folder) / "config.yaml"))
    if run.dip is None:
        raise ValueError(f"{folder} holds a plain run, which has no ensemble: fine-tune with `dip`.")
    return run


def first_problem(folder: str) -> str:
    """Write out the first held-out problem of a run with its answer, as in training."""
    path = Path(folder) / "data" / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} has no held-out problems (data/test.jsonl); give a text with --text.")
    problem = read_problems(str(path))[0]
    return f"{format_prompt(problem['question'])} {problem['answer']}"


def token_information(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, num_samples: int
) -> tuple[list[str], list[float]]:
    """Every token but the first, which nothing predicts, and the mutual information of the samples about it."""
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length, return_offsets_mapping=True)
    spans = inputs.pop("offset_mapping")[0].tolist()
    ids = inputs["input_ids"][0].tolist()
    if len(ids) < 2:
        raise ValueError(f"The text {text!r} has {len(ids)} tokens; it needs two, because nothing predicts the first.")
    prediction = predict(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, num_samples)
    return token_texts(text, ids, spans, tokenizer)[1:], prediction.mutual_information[0, :-1].tolist()


def token_texts(text: str, ids: list[int], spans: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Cut the text into its tokens, each with the space before it; special tokens are written by name.

    With some tokenizers, decoding tokens one by one would lose spaces. If tokens share a letter, the last one gets it.
    """
    special = tokenizer.all_special_ids
    inner = [span for token, span in zip(ids, spans, strict=True) if token not in special]
    cuts = [0]
    for (_, end), (start, _) in pairwise(inner):
        cuts.append(min(end, start))  # a space between two spans belongs to the second
    if inner:
        cuts.append(inner[-1][1])
    pieces = iter([text[start:end] for start, end in pairwise(cuts)])
    return [str(tokenizer.decode([token])) if token in special else next(pieces) for token in ids]


# ---- calibration ----


def draw_calibration(args: argparse.Namespace) -> list[Path]:
    """Draw reliability and risk against coverage of the answers of each group."""
    answers = {
        label: read_answers(files, args.filter, args.metric) for label, files in split_groups(args.groups).items()
    }
    folder = make_folder(args.output)
    paths = [folder / "reliability.png", folder / "risk-coverage.png"]
    plot_reliability(answers, str(paths[0]), args.num_bins, args.binning)
    plot_risk_coverage(answers, str(paths[1]))
    return paths


def read_answers(files: list[str], filter_name: str | None, metric: str | None) -> tuple[list[float], list[float]]:
    """Read confidence and correctness of the answers, those of several files one after another.

    Args:
        files (`list[str]`): `samples_*.jsonl` of eval/run.py.
        filter_name (`str`, *optional*): which of the task's filters, if there are several.
        metric (`str`, *optional*): which of the samples' entries tells that an answer is right, if there are several.

    Raises:
        ValueError: a file is missing, broken or without confidences, or has no such filter or metric, or several to
            choose from.
    """
    confidence, correct = [], []
    for file in files:
        rows = read_json_lines(file, ("filter",))
        chosen = choose(file, "filter", sorted({row["filter"] for row in rows}), filter_name)
        rows = [row for row in rows if row["filter"] == chosen]
        if not all("confidence" in row for row in rows):
            raise ValueError(f"{file} has no confidences; give the samples of eval/run.py with --log_samples.")
        name = choose(file, "metric", [name for name in METRICS if all(name in row for row in rows)], metric)
        confidence += [row["confidence"] for row in rows]
        correct += [row[name] for row in rows]
    return confidence, correct


def choose(file: str, what: str, names: list[str], wanted: str | None) -> str:
    """Find the wanted name among those that a file has; without a wanted name, take the only one."""
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        asked = f"the {what}s" if wanted is None else f"no {what} {wanted}; it has"
        raise ValueError(f"{file} has {asked} {', '.join(names) or 'none'}: choose by --{what}.")
    return wanted


if __name__ == "__main__":
    main()
