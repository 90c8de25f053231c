"""The comparisons of a study: each reference with every other method that takes as many passes at inference.

One family of Holm's correction is one answer of one reference, by one figure, against all of these.
"""

from statistics import mean

from report.comparison import Comparison, compare, holm, mcnemar, smallest_p_value, verdict
from report.study_rows import HIGHER_IS_BETTER, is_nll_of_other_data

COMPARED = ("nll", "token_ece", "exact_match", "answer_ece", "aurc")  # and the NLL of other data sets


def compare_references(rows: list[dict], references: list[str], margin: float) -> list[dict]:
    """Compare each answer of each reference with the other methods' answers of equal cost at inference.

    Args:
        rows (`list[dict]`): of a study's summary.
        references (`list[str]`): methods; one is among the others of another.
        margin (`float`): nats per token within which an NLL counts as the same. Other figures have no margin, and are
            never called equivalent, those of other data sets among them.

    Returns:
        `list[dict]`: in each the `reference` and its `answer`, the other's `method` and `other_answer`, the `figure`,
        the fields of `Comparison` for reference - other, the `other_mean` over the pairs, `problems_p_value` (of right
        answers), `holm_p_value`, `smallest_p_value` and `verdict` on the reference.
    """
    found = []
    other_data = dict.fromkeys(name for row in rows for name in row["figures"] if is_nll_of_other_data(name))
    for ours in (row for row in rows if row["method"] in references):
        others = [row for row in rows if row["method"] != ours["method"] and row["num_passes"] == ours["num_passes"]]
        for figure in (*COMPARED, *other_data):
            found += _family(ours, others, figure, margin if figure == "nll" else 0.0)
    return found


def compared_of(comparisons: list[dict], reference: str, answer: str) -> list[dict]:
    """Choose the comparisons of one answer of a reference."""
    return [entry for entry in comparisons if (entry["reference"], entry["answer"]) == (reference, answer)]


def compared_figures(comparisons: list[dict]) -> list[str]:
    """Name the figures that are compared, in the order of a report."""
    found = dict.fromkeys(entry["figure"] for entry in comparisons)
    return [name for name in dict.fromkeys((*COMPARED, *found)) if name in found]


def _family(ours: dict, others: list[dict], figure: str, margin: float) -> list[dict]:
    others = [row for row in others if _shared_seeds(ours, row, figure)]
    entries = [_entry(ours, row, figure) for row in others]
    for entry, adjusted in zip(entries, holm([entry["p_value"] for entry in entries]), strict=True):
        entry["holm_p_value"] = adjusted
        entry["smallest_p_value"] = smallest_p_value(entry["num_pairs"], len(entries))
        compared = Comparison(*(entry[name] for name in Comparison._fields))
        if figure in HIGHER_IS_BETTER:
            compared = compared._replace(difference=-compared.difference, low=-compared.high, high=-compared.low)
        entry["verdict"] = verdict(compared, adjusted, margin)
    return entries


def _entry(ours: dict, other: dict, figure: str) -> dict:
    """Compare two rows by one figure, paired by seed.

    That a method has more right answers must hold for other seeds and for other problems. The first is asked by
    Wilcoxon's test over seeds, the second by McNemar's over problems; pooled answers, problems times seeds, would be
    taken for independent ones. The p-value is the larger of the two, which is a test of both (Berger 1982).
    """
    seeds = _shared_seeds(ours, other, figure)
    compared = compare(*([row["figures"][figure]["values"][seed] for seed in seeds] for row in (ours, other)))
    entry = {"reference": ours["method"], "answer": ours["answer"], "figure": figure}
    entry |= {"method": other["method"], "other_answer": other["answer"], **compared._asdict()}
    entry["other_mean"] = mean(other["figures"][figure]["values"][seed] for seed in seeds)
    if figure == "exact_match":
        entry["problems_p_value"] = mcnemar(*(_num_right(row, seeds) for row in (ours, other)))
        entry["p_value"] = max(entry["p_value"], entry["problems_p_value"])
    return entry


def _shared_seeds(ours: dict, other: dict, figure: str) -> list[str]:
    first, second = (row["figures"].get(figure, {"values": {}})["values"] for row in (ours, other))
    return [seed for seed in first if seed in second]


def _num_right(row: dict, seeds: list[str]) -> list[int]:
    return [sum(map(int, of_problem)) for of_problem in zip(*(row["right"][seed] for seed in seeds), strict=True)]
