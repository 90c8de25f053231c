"""Compare the ways to answer at equal k: noise off, ensemble, self-consistency and temperature self-consistency.

    make demo
    python eval/modes.py --base runs/demo/base --dip runs/demo/DIPNet-{0,1,2} --plain runs/demo/plain-{0,1,2} \
        --data word_problems=runs/demo/data/test.jsonl --gen_kwargs max_gen_toks=120 --output runs/modes

One folder a seed: adapters of `recipes/finetune.py`, and plain runs of it that temperature self-consistency is also
compared on. Each evaluation is one of `eval/run.py`, whose finished ones are not run again. The temperature is the
harness' own for self-consistency on GSM8K. `results.json` gets one row a mode, seed, task and filter.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put eval/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval import run
from report import format_spreads, provenance

TEMPERATURE = "do_sample=True,temperature=0.7"
SHOWN = {"accuracy": "accuracy", "ECE": "ece_width", "NLL": "nll", "AUROC": "auroc", "AURC": "aurc"}


def main(arguments: list[str] | None = None) -> None:
    """Run every mode on every seed, write the rows and print a table a task."""
    args = parse_arguments(arguments)
    modes = list_modes(args.samples, has_plain=bool(args.plain))
    rows = []
    for mode, (is_dip, model_args, flags) in modes.items():
        for seed, folder in enumerate(args.dip if is_dip else args.plain):
            network = f"pretrained={args.base},peft={folder}" if is_dip else f"pretrained={folder}"
            output = Path(args.output) / f"{mode.replace(' ', '-').replace(',', '')}-{seed}"
            calibration = evaluate(args, ",".join([network, *model_args]), flags, output)
            rows += [
                {"mode": mode, "seed": seed, "task": task, "filter": name, **figures}
                for task, by_filter in calibration.items()
                for name, figures in by_filter.items()
            ]
    document = {"provenance": provenance(__file__, vars(args)), "rows": rows}
    path = Path(args.output) / "results.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_tables(rows)
    print(f"\nWritten to {path}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the base model of the adapters")
    parser.add_argument("--dip", nargs="+", required=True, metavar="FOLDER", help="DIP adapters, one per seed")
    parser.add_argument(
        "--plain", nargs="+", default=[], metavar="FOLDER", help="plainly fine-tuned models, one per seed"
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="TASK=PATH", help="tasks of eval/tasks/")
    parser.add_argument("--samples", type=int, default=8, help="k")
    parser.add_argument("--batch_size", default="64")
    parser.add_argument("--gen_kwargs", default="", help="for all modes, such as max_gen_toks=120")
    parser.add_argument("--limit", help="problems per task")
    parser.add_argument("--output", required=True, metavar="FOLDER")
    return parser.parse_args(arguments)


def list_modes(k: int, has_plain: bool) -> dict[str, tuple[bool, list[str], list[str]]]:
    """Name the modes: whether of the DIP adapter, their model arguments, their flags and sampling."""
    modes = {
        "noise off": (True, [], []),
        f"ensemble of {k}": (True, [f"num_samples={k}"], []),
        f"vote of {k} samples": (True, [f"num_samples={k}", "average=vote"], []),
        f"vote of {k}, temperature": (True, [], ["--repeats", str(k), "--gen_kwargs", TEMPERATURE]),
    }
    plain: dict[str, tuple[bool, list[str], list[str]]] = {
        "plain": (False, [], []),
        f"plain, vote of {k}, temperature": (False, [], ["--repeats", str(k), "--gen_kwargs", TEMPERATURE]),
    }
    return {**plain, **modes} if has_plain else modes


def evaluate(args: argparse.Namespace, model_args: str, flags: list[str], output: Path) -> dict:
    """Run one evaluation, unless it has been run, and read its figures by task and filter."""
    command = ["--model_args", model_args, "--tasks", ",".join(item.partition("=")[0] for item in args.data)]
    command += ["--data", *args.data, "--batch_size", args.batch_size, "--output_path", str(output), *flags]
    if args.limit:
        command += ["--limit", args.limit]
    if args.gen_kwargs:
        command = merge_gen_kwargs(command, args.gen_kwargs)
    if run.results_file(str(output)) is None:
        run.main(command)
    finished = run.results_file(str(output))
    assert finished is not None
    results = json.loads(finished.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(run.describe(*run.parse_arguments(command))))
    if results["provenance"]["config"] != wanted:
        raise ValueError(f"{output} holds the results of another command. Choose another --output.")
    return results["calibration"]


def merge_gen_kwargs(command: list[str], gen_kwargs: str) -> list[str]:
    """Add to the settings of the generation; the flag takes them all at once."""
    if "--gen_kwargs" not in command:
        return [*command, "--gen_kwargs", gen_kwargs]
    place = command.index("--gen_kwargs") + 1
    return [*command[:place], f"{command[place]},{gen_kwargs}", *command[place + 1 :]]


def print_tables(rows: list[dict]) -> None:
    """Print mean and spread over the seeds, a table a task and filter; a figure that a seed lacks is left out."""
    for task, name in dict.fromkeys((row["task"], row["filter"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["filter"]) == (task, name)]
        shown = {
            heading: figure for heading, figure in SHOWN.items() if all(row[figure] is not None for row in chosen)
        }
        values: dict[str, dict[str, list[float]]] = {}
        for row in chosen:
            columns = values.setdefault(row["mode"], {heading: [] for heading in shown})
            for heading, figure in shown.items():
                columns[heading].append(row[figure])
        print(f"\n{task}, {name}, n = {chosen[0]['n']} a seed, mean +- standard deviation over seeds\n")
        print(format_spreads(values))


if __name__ == "__main__":
    main()
