"""What the report of a study says: its sentences, its gaps and its tables, as text that Markdown and HTML share."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from report.comparison import SIGNIFICANCE
from report.study_families import COMPARED
from report.study_rows import HEADINGS, PLAIN

IN_SENTENCES = ("nll", "token_ece", "exact_match")
FIRST_HEADINGS = ("method", "answer", "seeds")
MOST_NAMES = 3  # in a sentence
VERDICTS = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equivalent": "equivalent to {} within {margin:g} nats",
    "no difference shown": "not shown to differ from {}",
}


class TextCell(NamedTuple):
    """A cell of a table."""

    text: str = "-"  # may have several lines
    verdict: str = ""  # of a comparison
    links: tuple[tuple[str, str], ...] = ()  # text and file, in place of `text`


class Table(NamedTuple):
    """A table with what a reader needs to know of it."""

    title: str
    explanation: str
    header: tuple[str, ...]
    rows: Sequence[tuple[TextCell, ...]]


def sentences(summary: dict) -> list[str]:
    """Say in one sentence per answer what is shown of a reference; nothing that a test or an interval does not."""
    references = summary["study"]["references"]
    said = [_sentence(summary, row) for row in summary["rows"] if row["method"] in references]
    return said or [f"{', '.join(references)}: not tuned yet, so that nothing can be said."]


def _sentence(summary: dict, row: dict) -> str:
    subject = f"{row['method']}, {row['answer']}"
    compared = _compared(summary, row)
    if not compared:
        return f"{subject}: not compared with anything yet."
    plain: dict = next((other["figures"] for other in summary["rows"] if other["method"] == PLAIN), {})
    parts = []
    for name in IN_SENTENCES:
        if verdicts := _verdicts([entry for entry in compared if entry["figure"] == name], summary["study"]["margin"]):
            of_plain = (
                f" ({PLAIN} in one pass: {plain[name]['mean']:.4g})"
                if name in plain and row["method"] != PLAIN
                else ""
            )
            heading = HEADINGS[name][0].upper() + HEADINGS[name][1:]
            parts.append(f"{heading} {row['figures'][name]['mean']:.4g}{of_plain}, {verdicts}")
    cost = (
        ""
        if row["relative_seconds"] is None
        else f"; training takes {row['relative_seconds']:.2g} × the time of {PLAIN}"
    )
    return f"{subject}: {'. '.join(parts)} ({_seeds(compared)}{cost})."


def _compared(summary: dict, ours: dict) -> list[dict]:
    """Choose the comparisons of one answer of a reference."""
    own = (ours["method"], ours["answer"])
    return [entry for entry in summary["comparisons"] if (entry["reference"], entry["answer"]) == own]


def _verdicts(compared: list[dict], margin: float) -> str:
    by_verdict: dict[str, list[str]] = {}
    for entry in compared:
        name = entry["method"] + (" (distilled)" if entry["other_answer"] == "distilled" else "")
        by_verdict.setdefault(entry["verdict"], []).append(name)
    return "; ".join(
        text.format(_names(by_verdict[verdict], len(compared)), margin=margin)
        for verdict, text in VERDICTS.items()
        if verdict in by_verdict
    )


def _names(others: list[str], num_others: int) -> str:
    """Name a few, and count many: the tables name them all."""
    if len(others) <= MOST_NAMES:
        return ", ".join(others)
    return f"all {num_others} others" if len(others) == num_others else f"{len(others)} of {num_others} others"


def _seeds(compared: list[dict]) -> str:
    numbers = sorted({entry["num_pairs"] for entry in compared})
    text = f"{' to '.join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))} seeds"
    smallest = max(entry["smallest_p_value"] for entry in compared)
    if smallest >= SIGNIFICANCE:
        text += f", too few to show every difference: the least possible p is {smallest:.2g}"
    return text


def conditions(summary: dict) -> list[str]:
    """Say how the methods were compared."""
    study = summary["study"]
    num_trials = len(study["methods"][study["references"][0]]["values"])
    return [
        f"Each of {len(study['methods'])} methods was tuned by {num_trials} values of one setting with "
        f"{len(study['tuning_seeds'])} seed(s) on validation problems; each answer takes the value that was best for "
        "it, a distilled model the one of the mean that it learns from. The test problems were scored once per cell.",
        "NLL is in nats per answer token, lower is better; token figures are of the likeliest token against the "
        "target. Intervals are bootstrap intervals of the mean over seeds, at 99%.",
        f"Each of {', '.join(study['references'])} is compared with what takes as many passes at inference. "
        "Differences are paired by "
        f"seed: Wilcoxon's signed-rank test, with Holm's correction over the methods that one answer is compared with "
        f"by one figure; a claim needs p < {SIGNIFICANCE:g}. Equivalence is claimed of the NLL alone, by an interval "
        f"within {study['margin']:g} nats. Exact match must differ over seeds and, by McNemar's test on how many "
        "seeds have each problem right, over problems: p is the larger of the two.",
        "A deep ensemble is the mean probability of as many plain runs, by groups of seeds that share none: too few "
        "groups for a test.",
    ]


def gaps(summary: dict) -> list[str]:
    """Say what is missing and what limits the comparison."""
    said = [f"{summary['num_cells']['done']} of {summary['num_cells']['all']} cells known so far are done."]
    if summary["not_tuned"]:
        said.append(f"Not tuned yet, and so in no table: {', '.join(summary['not_tuned'])}.")
    if not_run := sorted(summary["tuning"].keys() - {row["method"] for row in summary["rows"]}):
        said.append(f"Tuned, and not run on the test problems, as the best on validation are: {', '.join(not_run)}.")
    if at_edge := [f"{row['method']} ({row['answer']})" for row in summary["rows"] if _is_at_edge(summary, row)]:
        said.append(
            f"The best value is the least or the largest tried, and a better one may lie beyond: {', '.join(at_edge)}."
        )
    if absent := [row["method"] for row in summary["rows"] if "is_deep_ensemble" in row and not row["num_seeds"]]:
        said.append(
            f"No {', no '.join(absent)}: too few plain cells have their tokens.safetensors, which are not committed."
        )
    if len(summary["commits"]) > 1:
        said.append(f"The cells come from {len(summary['commits'])} commits: {', '.join(summary['commits'])}.")
    if len(summary["hardware"]) > 1:
        said.append(
            f"The cells come from different machines, and times do not compare: {', '.join(summary['hardware'])}."
        )
    if differing := [name for name, versions in summary["versions"].items() if len(versions) > 1]:
        said.append(f"The cells come from different versions of {', '.join(differing)}.")
    return said


def _is_at_edge(summary: dict, row: dict) -> bool:
    """Whether a tuned number is the least or the largest tried, but for 0, below which there is nothing."""
    if row["validation_nll"] is None or row["value"] == 0 or not _is_number(row["value"]):
        return False
    tried = [value for value in summary["study"]["methods"][row["method"]]["values"] if _is_number(value)]
    return row["value"] in (min(tried), max(tried))


def _is_number(value) -> bool:
    return type(value) in (int, float)


def missing_cells(summary: dict) -> list[str]:
    """Count the missing cells by method and reason."""
    counts = Counter(("/".join(gap["cell"].split("/")[:2]), gap["why"]) for gap in summary["missing"])
    return [f"{cells}: {number} {'cell' if number == 1 else 'cells'} {why}" for (cells, why), number in counts.items()]


def tables(summary: dict) -> list[Table]:
    """Lay out all figures; tables without any are left out."""
    others = [name for row in summary["rows"] for name in row["figures"] if name not in HEADINGS]
    found = [
        _figures("Held-out problems", "The given answers, token by token.", summary, list(HEADINGS)[:3]),
        _figures(
            "Generated answers", "By the task's first filter, such as strict-match.", summary, list(HEADINGS)[3:]
        ),
        _figures("Another distribution", "Problems of other data sets.", summary, list(dict.fromkeys(others))),
        *(_comparisons(summary, row) for row in summary["rows"] if row["method"] in summary["study"]["references"]),
        _costs(summary),
        _tuning(summary),
    ]
    return [table for table in found if table.rows]


def _figures(title: str, explanation: str, summary: dict, names: list[str]) -> Table:
    """Lay out some figures of all rows."""
    names = [name for name in names if any(name in row["figures"] for row in summary["rows"])]
    rows = [
        (*_first_cells(summary, row), *(_spread(row, name) for name in names), _files(row))
        for row in summary["rows"]
        if any(name in row["figures"] for name in names)
    ]
    explanation += " Mean ± standard deviation, and the 99% interval of the mean."
    return Table(title, explanation, (*FIRST_HEADINGS, *(HEADINGS.get(n, n) for n in names), "result files"), rows)


def _costs(summary: dict) -> Table:
    """Lay out what each row was tuned to and what it costs."""
    rows = []
    for row in summary["rows"]:
        loss = "-" if row["validation_nll"] is None else f"{row['validation_nll']:.4f}"
        seconds = "-" if row["train_seconds"] is None else f"{row['train_seconds']:.0f} s"
        relative = "-" if row["relative_seconds"] is None else f"{row['relative_seconds']:.2f}"
        texts = (f"{row['setting']}={row['value']}", loss, seconds, relative, str(row["num_passes"]))
        rows.append((*_first_cells(summary, row), *map(TextCell, texts), _files(row)))
    header = ("tuned value", "validation NLL", "training", f"over {PLAIN}", "passes at inference", "result files")
    return Table("Settings and cost", "Training includes distillation.", (*FIRST_HEADINGS, *header), rows)


def _first_cells(summary: dict, row: dict) -> tuple[TextCell, ...]:
    seeds = f"{row['num_seeds']} of {len(summary['study']['seeds'])}"
    return TextCell(row["method"]), TextCell(row["answer"]), TextCell(seeds)


def _files(row: dict) -> TextCell:
    return TextCell(links=tuple(row["files"].items()))


def _spread(row: dict, name: str) -> TextCell:
    if name not in row["figures"]:
        return TextCell()
    figure = row["figures"][name]
    deviation = "" if figure["std"] is None else f" ± {figure['std']:.4f}"
    number = "" if len(figure["values"]) == row["num_seeds"] else f", n = {len(figure['values'])}"
    return TextCell(f"{figure['mean']:.4f}{deviation}{number}\n{figure['low']:.4f} to {figure['high']:.4f}")


def _comparisons(summary: dict, ours: dict) -> Table:
    """Lay out one answer of a reference against all others, a column per figure."""
    compared = _compared(summary, ours)
    names = [name for name in COMPARED if any(entry["figure"] == name for entry in compared)]
    others = dict.fromkeys((entry["method"], entry["other_answer"]) for entry in compared)
    by_place = {(entry["method"], entry["other_answer"], entry["figure"]): entry for entry in compared}
    files = {(row["method"], row["answer"]): _files(row) for row in summary["rows"]}
    rows = [
        (*map(TextCell, other), *(_comparison(by_place.get((*other, name))) for name in names), files[other])
        for other in others
    ]
    return Table(
        f"{ours['method']}, {ours['answer']}, against the others",
        f"{ours['method']} minus the other, its 99% interval, p after Holm's correction, and what the first is.",
        ("other", "its answer", *(HEADINGS[name] for name in names), "its result files"),
        rows,
    )


def _comparison(entry: dict | None) -> TextCell:
    if entry is None:
        return TextCell()
    interval = f"{entry['difference']:+.4f}\n{entry['low']:+.4f} to {entry['high']:+.4f}"
    return TextCell(f"{interval}\np = {entry['holm_p_value']:.2g}: {entry['verdict']}", entry["verdict"])


def _tuning(summary: dict) -> Table:
    """Lay out the validation NLL of every value that was tried."""
    rows = [
        (TextCell(name), TextCell(answer), TextCell(summary["study"]["methods"][name]["setting"]))
        + (TextCell(", ".join(f"{value}: {loss:.4f}" for value, loss in zip(tuned["values"], nll, strict=True))),)
        + (_files(tuned),)
        for name, tuned in summary["tuning"].items()
        for answer, nll in tuned["nll"].items()
    ]
    explanation = "Mean validation NLL of each value tried; the least is taken."
    header = ("method", "answer", "setting", "validation NLL by value", "result files by value and seed")
    return Table("Tuning", explanation, header, rows)
