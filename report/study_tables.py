"""The tables of a study's report, as text that Markdown and HTML share."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from scipy.stats import spearmanr

from report.comparison import SIGNIFICANCE
from report.study_families import compared_figures, compared_of
from report.study_rows import (
    HEADINGS,
    MOST_SECONDS,
    ONE_PASS,
    PLAIN,
    SMOOTHNESS,
    headings,
    plain_at_equal_time,
    row_name,
    rows_of_equal_cost,
)

FIRST_HEADINGS = ("method", "answer", "seeds")
TOKEN_FIGURES = ("nll", "token_accuracy", "token_ece", "token_brier", "best_validation_nll")
ANSWER_FIGURES = ("exact_match", "answer_ece", "answer_brier", "auroc", "aurc")
LEAST_CORRELATED = 5  # rows: fewer are in order by chance
VERDICTS = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equivalent": "equivalent to {}",
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


def tables(summary: dict) -> list[Table]:
    """Lay out all figures; tables without any are left out."""
    references = [row for row in summary["rows"] if row["method"] in summary["study"]["references"]]
    others = [name for row in summary["rows"] for name in row["figures"] if name not in HEADINGS]
    found = [
        _verdicts(summary, references),
        _equal_cost(summary, references),
        _equal_time(summary, references),
        _figures("Held-out problems", _held_out(summary["rows"]), summary, TOKEN_FIGURES),
        _figures("Generated answers", "By the task's first filter, such as strict-match.", summary, ANSWER_FIGURES),
        _figures("Another distribution", "Problems of other data sets.", summary, list(dict.fromkeys(others))),
        _smoothness(summary),
        *(_comparisons(summary, row) for row in references),
        _costs(summary),
        _tuning(summary),
    ]
    return [table for table in found if table.rows]


def _verdicts(summary: dict, references: list[dict]) -> Table:
    """Count what is shown of each answer of a reference, and name what it is shown of."""
    compared = {id(row): compared_of(summary["comparisons"], row["method"], row["answer"]) for row in references}
    names = compared_figures(summary["comparisons"])
    rows = []
    for row in (row for row in references if compared[id(row)]):
        by_figure = [[entry for entry in compared[id(row)] if entry["figure"] == name] for name in names]
        rows.append((TextCell(row["method"]), TextCell(row["answer"]), *map(_verdict_counts, by_figure)))
    explanation = "By all comparisons below. Where a difference is not shown there may be one."
    return Table("What is shown", explanation, ("method", "answer", *headings(names)), rows)


def _verdict_counts(compared: list[dict]) -> TextCell:
    by_verdict: dict[str, list[str]] = {}
    for entry in compared:
        name = entry["method"] + (" (distilled)" if entry["other_answer"] == "distilled" else "")
        by_verdict.setdefault(entry["verdict"], []).append(name)
    lines = [text.format(", ".join(by_verdict[kind])) for kind, text in VERDICTS.items() if kind in by_verdict]
    if not lines:
        return TextCell()
    smallest = max(entry["smallest_p_value"] for entry in compared)
    if smallest >= SIGNIFICANCE:
        lines.append(f"(too few seeds: the least possible p is {smallest:.2g})")
    return TextCell("\n".join(lines))


def _equal_cost(summary: dict, references: list[dict]) -> Table:
    """Lay out what costs as little as plain at inference and little more in training, from the least NLL on."""
    equal = rows_of_equal_cost(summary["rows"])
    against = [row for row in references if any(row is other for other in equal)]
    names = [name for name in ("nll", "token_ece", "exact_match") if any(name in row["figures"] for row in equal)]
    rows = []
    for row in equal:
        compared = (_comparison_with(summary, reference, row, "nll") for reference in against)
        figures = (TextCell(_mean(row, name)) for name in names)
        rows.append((*_first_cells(summary, row), TextCell(_times(row["relative_seconds"])), *figures, *compared))
    header = (f"time over {PLAIN}", *headings(names))
    explanation = (
        f"One pass at inference, and at most {MOST_SECONDS:g} times the training time of {PLAIN}, by the clock; "
        "from the least NLL on. The last columns are a reference's NLL minus the row's, as in its own table."
    )
    if over := [
        f"{row_name(row)} {_times(row['relative_seconds'])}"
        for row in summary["rows"]
        if row["num_passes"] == 1 and row["relative_seconds"] is not None and row["relative_seconds"] > MOST_SECONDS
    ]:
        explanation += f" Over it: {', '.join(over)}."
    header += tuple(f"NLL of {row_name(row)} minus it" for row in against)
    return Table("Equal cost", explanation, (*FIRST_HEADINGS, *header), rows if len(rows) > 1 else [])


def _equal_time(summary: dict, references: list[dict]) -> Table:
    """Lay out each answer of a reference beside what plain training does with as many runs or steps."""
    rows = []
    for row in references:
        other = plain_at_equal_time(summary["rows"], row)
        if other is None or "nll" not in row["figures"]:
            continue
        ours = (row_name(row), _times(row["relative_seconds"]), _mean(row, "nll"))
        theirs = (other["method"], _times(other["relative_seconds"]), _mean(other, "nll"))
        rows.append((*map(TextCell, ours + theirs), _comparison_with(summary, row, other, "nll")))
    explanation = (
        f"For one pass {PLAIN} training of twice the steps; for the mean of k passes a deep ensemble of k {PLAIN} "
        "runs, which has too few groups of seeds for a test."
    )
    time = f"time over {PLAIN}"
    header = ("reference", time, "NLL", f"{PLAIN} training", time, "NLL", "NLL of the first minus the second")
    return Table("Plain training at equal time or passes", explanation, header, rows)


def _mean(row: dict, name: str) -> str:
    return f"{row['figures'][name]['mean']:.4f}" if name in row["figures"] else "-"


def _times(relative_seconds: float | None) -> str:
    return "-" if relative_seconds is None else f"{relative_seconds:.2f}"


def _figures(title: str, explanation: str, summary: dict, names: Sequence[str]) -> Table:
    """Lay out some figures of all rows."""
    shown = [name for name in names if any(name in row["figures"] for row in summary["rows"])]
    rows = [
        (*_first_cells(summary, row), *(_spread(row, name) for name in shown), _files(row))
        for row in summary["rows"]
        if any(name in row["figures"] for name in shown)
    ]
    explanation += " Mean ± standard deviation, and the 99% interval of the mean."
    return Table(title, explanation, (*FIRST_HEADINGS, *headings(shown), "result files"), rows)


def _held_out(rows: list[dict]) -> str:
    """Say what the table of the test problems has, and how far validation problems tell which method is best there."""
    explanation = "The given answers, token by token; then the validation problems' NLL of each run's best step."
    rows = [row for row in rows if "best_validation_nll" in row["figures"]]
    if len(rows) >= LEAST_CORRELATED:
        nll = [row["figures"]["nll"]["mean"] for row in rows]
        of_runs = spearmanr([row["figures"]["best_validation_nll"]["mean"] for row in rows], nll)[0]
        of_tuning = spearmanr([row["validation_nll"] for row in rows], nll)[0]
        explanation += (
            f" The rank correlation of these {len(rows)} methods' NLL with it is {of_runs:+.2f}, and with the NLL of "
            f"their tuning {of_tuning:+.2f}."
        )
    return explanation


def _smoothness(summary: dict) -> Table:
    """Lay out how smooth the networks are beside their loss, and whether the smoother ones have less of it."""
    rows = [row for row in summary["rows"] if SMOOTHNESS[0] in row["figures"]]
    explanation = (
        "Of the network that answers without noise: the local Lipschitz constant of its logits at the embeddings, for "
        "a move as long as a typical token; and by how much the NLL rises under noise. Lower is smoother. Measured "
        f"with the first {summary['study']['num_smoothness_problems']} test problems."
    )
    if len(rows) >= LEAST_CORRELATED:
        nll = [row["figures"]["nll"]["mean"] for row in rows]
        by_name = {name: [row["figures"][name]["mean"] for row in rows] for name in SMOOTHNESS}
        correlations = (f"{HEADINGS[name]} {spearmanr(values, nll)[0]:+.2f}" for name, values in by_name.items())
        explanation += (
            f" Rank correlation with the NLL over these {len(rows)} means, which describes them and tests nothing: "
            f"{', '.join(correlations)}."
        )
    return _figures("Smoothness beside generalization", explanation, {**summary, "rows": rows}, ("nll", *SMOOTHNESS))


def _costs(summary: dict) -> Table:
    """Lay out what each row was tuned to and what it costs."""
    rows = []
    for row in summary["rows"]:
        loss = "-" if row["validation_nll"] is None else f"{row['validation_nll']:.4f}"
        by_machine = {machine: [time["seconds"] for time in times.values()] for machine, times in row["times"].items()}
        measured = (f"{median(times):.0f} s on {machine}, n = {len(times)}" for machine, times in by_machine.items())
        seconds = "\n".join(measured) or "-"
        relative = _times(row["relative_seconds"])
        texts = (f"{row['setting']}={row['value']}", loss, seconds, relative, str(row["num_passes"]))
        rows.append((*_first_cells(summary, row), *map(TextCell, texts), _files(row)))
    header = ("tuned value", "validation NLL", "training", f"over {PLAIN}", "passes at inference", "result files")
    return Table(
        "Settings and cost",
        "Training includes distillation: the median of n runs, and of a run's time over plain's with the same seed.",
        (*FIRST_HEADINGS, *header),
        rows,
    )


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
    compared = compared_of(summary["comparisons"], ours["method"], ours["answer"])
    names = compared_figures(compared)
    others = dict.fromkeys((entry["method"], entry["other_answer"]) for entry in compared)
    by_place = {(entry["method"], entry["other_answer"], entry["figure"]): entry for entry in compared}
    files = {(row["method"], row["answer"]): _files(row) for row in summary["rows"]}
    rows = [
        (*map(TextCell, other), *(_comparison(by_place.get((*other, name))) for name in names), files[other])
        for other in others
    ]
    return Table(
        f"{ours['method']}, {ours['answer']}, against the others",
        f"{ours['method']} minus the other, its 99% interval, p after Holm's correction, and what the first is. "
        "Of exact match McNemar's p over problems too, before any correction.",
        ("other", "its answer", *headings(names), "its result files"),
        rows,
    )


def _comparison_with(summary: dict, ours: dict, other: dict, figure: str) -> TextCell:
    """Lay out one comparison of an answer of a reference; nothing where the other is the reference itself."""
    place = (other["method"], other["answer"], figure)
    compared = compared_of(summary["comparisons"], ours["method"], ours["answer"])
    return _comparison(
        next((one for one in compared if (one["method"], one["other_answer"], one["figure"]) == place), None)
    )


def _comparison(entry: dict | None) -> TextCell:
    if entry is None:
        return TextCell()
    interval = f"{entry['difference']:+.4f}\n{entry['low']:+.4f} to {entry['high']:+.4f}"
    of_problems = f" ({entry['problems_p_value']:.2g} over problems)" if "problems_p_value" in entry else ""
    return TextCell(f"{interval}\np = {entry['holm_p_value']:.2g}{of_problems}: {entry['verdict']}", entry["verdict"])


def _tuning(summary: dict) -> Table:
    """Lay out the validation NLL of every value that was tried, methods from the least in one pass on."""
    methods = sorted(summary["tuning"].items(), key=lambda item: min(item[1]["nll"][ONE_PASS]))
    rows = []
    for name, tuned in methods:
        for answer, nll in tuned["nll"].items():
            least = min(nll)
            best = tuned["values"][nll.index(least)]
            tried = ", ".join(f"{value}: {loss:.4f}" for value, loss in zip(tuned["values"], nll, strict=True))
            setting = summary["study"]["methods"][name]["setting"]
            texts = (name, answer, f"{least:.4f}", f"{setting}={best}", tried)
            rows.append((*map(TextCell, texts), _files(tuned)))
    seeds = ", ".join(map(str, summary["study"]["tuning_seeds"]))
    explanation = (
        f"Mean NLL of the validation problems over the tuning's seeds ({seeds}). The least chose its value, and some "
        "also the best step, so that it is too low; no test is made of it."
    )
    header = ("method", "answer", "least NLL", "its value", "NLL by value", "result files by value and seed")
    return Table("Tuning", explanation, header, rows)
