"""Result files as text: one run's summary, and mean and spread over seeds."""

from collections.abc import Sequence
from statistics import mean, stdev

from report.results import numbers, read_results, settings


def format_summary(results: dict) -> str:
    """Lay out one run: its configuration's main lines, its metrics and its scores, one per line.

    Args:
        results (`dict`): the content of a `results.json`.
    """
    config = results["provenance"]["config"]
    weights = config["weights"]["peft_type"] if isinstance(config["weights"], dict) else config["weights"]
    head = [("model", config["model"]), ("dataset", config["dataset"]), ("weights", weights)]
    head.append(("projections", "none" if results["noise"] is None else f"{len(results['noise'])} sites"))
    values = [(name, _format_number(value)) for name, value in numbers(results).items()]
    return format_table(("run", str(config["training"]["output_dir"])), head + values)


def format_seeds(groups: dict[str, list[str]], metrics: dict[str, str]) -> str:
    """Lay out mean and sample standard deviation over the seeds of each group, one group per line.

    Args:
        groups (`dict[str, list[str]]`): for each label the `results.json` files of its seeds.
        metrics (`dict[str, str]`): for each column's heading a dotted name, such as `gsm8k_local.exact_match`.

    Raises:
        ValueError: a group is empty, its runs differ in more than their seed, or lack a metric.
    """
    rows = []
    for label, result_files in groups.items():
        if not result_files:
            raise ValueError(f"{label} has no result files; leave it out or check the pattern they were found by.")
        runs = [read_results(result_file) for result_file in result_files]
        _check_same_settings(label, runs)
        rows.append((label, str(len(runs)), *(_mean_and_spread(label, runs, name) for name in metrics.values())))
    return format_table(("run", "n", *metrics), rows)


def format_spreads(values: dict[str, dict[str, list[float]]]) -> str:
    """Lay out mean and sample standard deviation over seeds, given `{line's label: {column's heading: values}}`."""
    headings = tuple(next(iter(values.values())))
    rows = [(label, *(_spread(columns[heading]) for heading in headings)) for label, columns in values.items()]
    return format_table(("", *headings), rows)


def format_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Align columns of text, the header above a rule."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in (header, rule, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _mean_and_spread(label: str, runs: list[dict], name: str) -> str:
    found = [numbers(run) for run in runs]
    if missing := [values for values in found if name not in values]:
        raise ValueError(f"{label} has no metric {name}; it has {', '.join(sorted(missing[0]))}.")
    return _spread([values[name] for values in found])


def _spread(values: list[float]) -> str:
    spread = f"{stdev(values):.4f}" if len(values) > 1 else "-"
    return f"{mean(values):.4f} +- {spread}"


def _check_same_settings(label: str, runs: list[dict]) -> None:
    first, *others = [settings(run) for run in runs]
    for other in others:
        if differing := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            raise ValueError(
                f"The runs of {label} differ in {', '.join(differing)}; a mean over seeds needs runs that differ in "
                "training.seed alone. Make them groups of their own."
            )


def _format_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
