"""What the report of a study says in words: three sentences to begin with, its conditions and its gaps."""

from collections import Counter
from collections.abc import Iterable

from report.comparison import SIGNIFICANCE
from report.study_families import compared_of
from report.study_rows import MOST_SECONDS, ONE_PASS, PLAIN, row_name, rows_of_equal_cost

WORDS = {"nll": "loss", "token_ece": "calibration error", "exact_match": "right answers"}


def sentences(summary: dict) -> list[str]:
    """Say what the references do in one pass: against plain, against the best other method, and at what cost.

    Of test problems nothing is said that a test or an interval does not show. A reference without any is told by the
    problems that it was tuned on, as such.
    """
    best = _best_other(summary)
    others = [(PLAIN, ""), *([] if best is None else [(best, ", the best other method")])]
    said = [f"Against {name}{what}{_seeds(summary, name)}: {_against(summary, name)}" for name, what in others]
    return [*said, f"Cost: {_costs(summary)}"]


def are_tested(summary: dict) -> bool:
    """Whether every reference is compared with plain on test problems."""
    references = summary["study"]["references"]
    return all(reference == PLAIN or _entries(summary, reference, PLAIN) for reference in references)


def _entries(summary: dict, reference: str, method: str) -> list[dict]:
    """Choose the comparisons of a reference with another method, both in one pass, by what `WORDS` has."""
    of_reference = compared_of(summary["comparisons"], reference, ONE_PASS)
    return [
        entry
        for entry in of_reference
        if (entry["method"], entry["other_answer"]) == (method, ONE_PASS) and entry["figure"] in WORDS
    ]


def _best_other(summary: dict) -> str | None:
    """Name the method of the least NLL that is no reference: on test problems, or if there are none by the tuning."""
    known = {*summary["study"]["references"], PLAIN}
    tested = {
        row["method"]: row["figures"]["nll"]["mean"]
        for row in summary["rows"]
        if row["answer"] == ONE_PASS and "nll" in row["figures"]
    }
    tuned = {name: _tuned_nll(summary, name) for name in summary["tuning"]}
    for found in (tested, tuned):
        if others := {name: nll for name, nll in found.items() if name not in known}:
            return min(others, key=lambda name: others[name])
    return None


def _tuned_nll(summary: dict, method: str) -> float:
    return min(summary["tuning"][method]["nll"][ONE_PASS])


def _seeds(summary: dict, method: str) -> str:
    compared = [_entries(summary, reference, method) for reference in summary["study"]["references"]]
    numbers = sorted({entry["num_pairs"] for entries in compared for entry in entries})
    return f" ({' to '.join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))} seeds)" if numbers else ""


def _against(summary: dict, method: str) -> str:
    said, by_tuning = [], []
    for reference in (name for name in summary["study"]["references"] if name != method):
        if entries := _entries(summary, reference, method):
            said.append(f"{_shown(reference, entries, summary['study']['margin'])}.")
        elif {reference, method} <= summary["tuning"].keys():
            ours, theirs = _tuned_nll(summary, reference), _tuned_nll(summary, method)
            by_tuning.append(f"{reference} has {_amount('nll', ours - theirs, theirs)}")
    if by_tuning:
        number = len(summary["study"]["tuning_seeds"])
        seeds = "one seed" if number == 1 else f"{number} seeds"
        said.append(f"{_listed(by_tuning)} on validation problems, with {seeds}, which shows nothing yet.")
    return " ".join(said) or "nothing can be said yet."


def _shown(reference: str, entries: list[dict], margin: float) -> str:
    """Say what a reference is shown to have more or less of than another method, and where no difference is shown."""
    if max(entry["smallest_p_value"] for entry in entries) >= SIGNIFICANCE:
        amount = _amount("nll", entries[0]["difference"], entries[0]["other_mean"])
        return f"{reference} has {amount} so far, which so few seeds cannot tell from chance"
    by_verdict: dict[str, list[dict]] = {}
    for entry in entries:
        by_verdict.setdefault(entry["verdict"], []).append(entry)
    parts = []
    if differing := by_verdict.get("better", []) + by_verdict.get("worse", []):
        amounts = [_amount(entry["figure"], entry["difference"], entry["other_mean"]) for entry in differing]
        parts.append(f"has {_listed(amounts)} (p < {SIGNIFICANCE:g})")
    if "equivalent" in by_verdict:
        parts.append(f"has the same loss within {margin:g} nats")
    if unclear := by_verdict.get("no difference shown"):
        parts.append(f"is not shown to differ in {_listed(WORDS[entry['figure']] for entry in unclear)}")
    return f"{reference} {_listed(parts)}"


def _amount(figure: str, difference: float, of: float) -> str:
    """Say how much more or less there is: losses and errors in percent, right answers in points."""
    if figure == "exact_match":
        return f"{100 * abs(difference):.1f} points {'more' if difference > 0 else 'fewer'} {WORDS[figure]}"
    return f"{abs(difference) / of:.1%} {'more' if difference > 0 else 'less'} {WORDS[figure]}"


def _listed(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def _costs(summary: dict) -> str:
    """Say how long the references train, and what is best of what costs as little."""
    times = {
        row["method"]: row["relative_seconds"]
        for row in summary["rows"]
        if row["answer"] == ONE_PASS and row["relative_seconds"] is not None
    }
    known = [name for name in summary["study"]["references"] if name in times and name != PLAIN]
    said = [f"{name} takes {times[name]:.1f} ×" for name in known]
    text = (
        f"{_listed(said)} {PLAIN}'s training time; an answer takes one pass." if said else "no times to compare yet."
    )
    return " ".join([text, *_equal_cost(summary)])


def _equal_cost(summary: dict) -> list[str]:
    """Say what is best of what takes one pass and little more training, and what a test shows of that."""
    equal = rows_of_equal_cost(summary["rows"])
    if len(equal) < 2:
        return []
    best, *others = equal
    names = {(row["method"], row["answer"]) for row in others}
    shown = [
        entry
        for entry in compared_of(summary["comparisons"], best["method"], best["answer"])
        if entry["figure"] == "nll" and entry["verdict"] == "better"
        if (entry["method"], entry["other_answer"]) in names
    ]
    than = f", less than {len(shown)} of the {len(others)} others (p < {SIGNIFICANCE:g})" if shown else ""
    return [
        f"Of {len(equal)} ways to answer in one pass after at most {MOST_SECONDS:g} times {PLAIN}'s training time, "
        f"{row_name(best)} has the least mean loss{than}."
    ]


def conditions(summary: dict) -> list[str]:
    """Say how the methods were compared."""
    study = summary["study"]
    num_trials = len(study["methods"][study["references"][0]]["values"])
    return [
        f"Each of {len(study['methods'])} methods was tuned by {num_trials} values of one setting with "
        f"{len(study['tuning_seeds'])} seed(s) on validation problems; each answer takes the value that was best for "
        "it, a distilled model the one of the mean that it learns from. What else a method sets (`set` in study.json) "
        "is not tuned here, and may come from earlier runs on such problems. The test problems were scored once per "
        "cell.",
        "NLL is in nats per answer token, lower is better; token figures are of the likeliest token against the "
        "target. Intervals are bootstrap intervals of the mean over seeds, at 99%.",
        f"Each of {', '.join(study['references'])} is compared with what takes as many passes at inference. "
        "Differences are paired by seed: Wilcoxon's signed-rank test, with Holm's correction over the methods that "
        f"one answer is compared with by one figure; a claim needs p < {SIGNIFICANCE:g}, and several answers and "
        "figures are several chances of a false one. Equivalence is claimed of the NLL alone, by an interval within "
        f"{study['margin']:g} nats. Exact match must differ over seeds and, by McNemar's test on how many seeds have "
        "each problem right, over problems: p is the larger of the two.",
        "A deep ensemble is the mean probability of as many plain runs, by groups of seeds that share none: too few "
        "groups for a test.",
        "The best other method is the one of the least mean NLL, of the test problems where it has any: this choice "
        "favours it. Times are those of training, before the test problems, and include distillation: the median "
        f"over seeds of a time over {PLAIN}'s with the same seed, on one machine and within an hour.",
    ]


def gaps(summary: dict) -> list[str]:
    """Say what is missing and what limits the comparison."""
    said = [f"{summary['num_cells']['done']} of {summary['num_cells']['all']} cells known so far are done."]
    if summary["not_tuned"]:
        said.append(f"Not tuned yet, and so in no table: {', '.join(summary['not_tuned'])}.")
    if not_run := sorted(summary["tuning"].keys() - {row["method"] for row in summary["rows"]}):
        why = "which of these run on the test problems is known once all are tuned"
        if not summary["not_tuned"]:
            why = "not run on the test problems, as the best on validation are"
        said.append(f"Tuned, and {why}: {', '.join(not_run)}.")
    if at_edge := [f"{row['method']} ({row['answer']})" for row in summary["rows"] if _is_at_edge(summary, row)]:
        said.append(
            f"The best value is the least or the largest tried, and a better one may lie beyond: {', '.join(at_edge)}."
        )
    if absent := [row["method"] for row in summary["rows"] if "is_deep_ensemble" in row and not row["num_seeds"]]:
        said.append(
            f"No {', no '.join(absent)}: too few plain cells have their tokens.safetensors, which are not committed."
        )
    if diverged := [
        f"{row['method']} ({row['answer']}, {len(row['diverged'])})" for row in summary["rows"] if row["diverged"]
    ]:
        said.append(f"Seeds that diverged, so that their NLL is no number, are left out of: {', '.join(diverged)}.")
    if len(summary["commits"]) > 1:
        said.append(f"The cells come from {len(summary['commits'])} commits: {', '.join(summary['commits'])}.")
    if len(summary["hardware"]) > 1:
        said.append(
            "The cells come from different machines, within which alone times are compared: "
            f"{', '.join(summary['hardware'])}."
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
