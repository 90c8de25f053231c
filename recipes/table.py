"""Mean and spread over seeds of finished runs of `recipes/finetune.py`, from their `results.json`.

    python recipes/table.py plain=a/results.json,b/results.json DIPNet=c/results.json,d/results.json \\
        --metrics NLL=gsm8k_local.eval_nll "exact match=gsm8k_local.exact_match,strict-match"

A group has a line for its last step. If its runs were scored that way, it has one for its best checkpoint and one for
the mean of k noisy passes. A metric is the dotted name of one of a task's scores.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: Python put recipes/ on the path, and the imports below start at the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from report import format_spreads
from report.results import check_same_settings, numbers, read_results, split_groups


def main(arguments: list[str] | None = None) -> None:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="LABEL=FILE[,FILE...]", help="a group, with one file per seed")
    parser.add_argument("--metrics", nargs="+", required=True, metavar="HEADING=NAME", help="the columns")
    args = parser.parse_args(arguments)
    metrics = {}
    for metric in args.metrics:
        heading, _, name = metric.rpartition("=")  # a heading may contain "="
        metrics[heading] = name
    rows: dict[str, dict[str, list[float]]] = {}
    for label, files in split_groups(args.groups).items():
        runs = [read_results(file) for file in files]
        check_same_settings(label, runs)
        for answer in answers_of(runs[0]):
            scored = [answers_of(run).get(answer, {"metrics": {}, "scores": {}}) for run in runs]
            rows[label + answer] = {heading: pick(scored, name) for heading, name in metrics.items()}
    print(format_spreads(rows))


def answers_of(results: dict) -> dict[str, dict]:
    """Metrics and scores of each way in which a run was scored, by what is added to the group's label."""
    answers = {"": results}
    if results.get("best_checkpoint"):
        answers[", best checkpoint"] = results["best_checkpoint"]
    if results.get("ensemble_scores"):
        num_samples = results["provenance"]["config"]["evaluation"]["num_samples"]
        answers[f", mean of {num_samples}"] = {"metrics": {}, "scores": results["ensemble_scores"]}
    return answers


def pick(scored: list[dict], name: str) -> list[float]:
    """One metric of every run.

    Raises:
        ValueError: a run has no such metric; the message lists what it has.
    """
    found = [numbers(results) for results in scored]
    for values in found:
        if name not in values:
            raise ValueError(f"No metric {name}; there are {', '.join(sorted(values))}.")
    return [values[name] for values in found]


if __name__ == "__main__":
    main()
