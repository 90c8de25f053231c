"""What is claimed of a study's rows: by which family, in which direction, and how seldom where there is nothing."""

import numpy as np
import pytest

from report.comparison import SIGNIFICANCE
from report.study_families import compare_references, compared_figures
from report.study_rows import spread

NUM_SEEDS = 12
DIFFICULTY = np.random.default_rng(5).normal(size=60)  # of each problem, for all methods


def make_row(method, answer="one pass", num_passes=1, right=None, **figures):
    """A row from one list of values per figure, one per seed."""
    if right is not None:
        figures["exact_match"] = [np.mean(of_seed) for of_seed in right]
    by_seed = {
        name: spread({str(seed): float(v) for seed, v in enumerate(values)}) for name, values in figures.items()
    }
    row = {"method": method, "answer": answer, "num_passes": num_passes, "figures": by_seed}
    return row | {"right": {str(seed): "".join(map(str, of_seed)) for seed, of_seed in enumerate(right or [])}}


def draw_right(generator, skill=0.0):
    """Draw which problems each seed has right: problems differ in difficulty, and runs in how well they went."""
    runs = skill + generator.normal(scale=0.7, size=(NUM_SEEDS, 1))
    return (generator.normal(size=(NUM_SEEDS, len(DIFFICULTY))) < runs - DIFFICULTY).astype(int).tolist()


def claims(entries, figure):
    return [entry["verdict"] for entry in entries if entry["figure"] == figure]


def test_families_are_the_answers_of_equal_passes_at_inference():
    nll = np.linspace(1, 2, NUM_SEEDS)
    rows = [
        make_row("dip", "one pass", nll=nll),
        make_row("dip", "mean of 8", 8, nll=nll),
        make_row("dip", "distilled", nll=nll),
        make_row("plain", nll=nll + 1),
        make_row("dropout", nll=nll + 1),
        make_row("dropout", "mean of 8", 8, nll=nll + 1),
        make_row("dropout", "distilled", nll=nll + 1),
        make_row("tuned", "mean of 4", 4, nll=nll + 1),
        make_row("late") | {"figures": {}},
    ]
    rows.append(make_row("deep ensemble of 8 (plain)", "mean of 8", 8) | {"figures": {"nll": spread({"0+1": 1.0})}})
    found = compare_references(rows, ["dip"], margin=0.01)
    others = {name: [] for name in ("one pass", "mean of 8", "distilled")}
    for entry in found:
        others[entry["answer"]].append((entry["method"], entry["other_answer"]))
        assert entry["verdict"] == "better"
    one_pass = [("plain", "one pass"), ("dropout", "one pass"), ("dropout", "distilled")]
    assert others == {"one pass": one_pass, "distilled": one_pass, "mean of 8": [("dropout", "mean of 8")]}
    smallest = 2.0 ** (1 - NUM_SEEDS)
    assert [entry["p_value"] for entry in found] == pytest.approx([smallest] * 7)
    assert [entry["holm_p_value"] for entry in found] == pytest.approx(
        [smallest * {"mean of 8": 1}.get(entry["answer"], 3) for entry in found]
    )


def test_each_reference_has_families_of_its_own():
    """What one is compared with, and so how much of its p-value is left, does not hang on the other."""
    rows = [
        make_row(name, nll=np.linspace(1, 2, NUM_SEEDS) + by) for name, by in (("dip", 0), ("new", -1), ("sam", 1))
    ]
    both = compare_references(rows, ["dip", "new"], margin=0.01)
    verdicts = {(entry["reference"], entry["method"]): entry["verdict"] for entry in both}
    assert verdicts == {
        ("dip", "new"): "worse",
        ("dip", "sam"): "better",
        ("new", "dip"): "better",
        ("new", "sam"): "better",
    }
    assert both == compare_references(rows, ["dip"], margin=0.01) + compare_references(rows, ["new"], margin=0.01)


def test_pairs_are_the_seeds_that_both_have():
    rows = [make_row("dip", nll=[1.0, 2.0, 3.0]), make_row("plain", nll=[1.5, 2.5])]
    (entry,) = compare_references(rows, ["dip"], margin=0.01)
    assert (entry["num_pairs"], entry["difference"]) == (2, -0.5) and entry["verdict"] == "no difference shown"


def test_more_right_answers_are_better_and_differ_over_seeds_and_over_problems():
    generator = np.random.default_rng(0)
    strong, weak = draw_right(generator, skill=3.0), draw_right(generator)
    rows = [make_row("dip", right=strong), make_row("plain", right=weak)]
    (entry,) = compare_references(rows, ["dip"], margin=0.01)
    assert entry["difference"] > 0 and entry["verdict"] == "better" and entry["problems_p_value"] < SIGNIFICANCE
    assert claims(compare_references(rows, ["plain"], margin=0.01), "exact_match") == ["worse"]

    one_problem = [[1] + [0] * 9] * NUM_SEEDS  # every seed is better, on the same problem
    rows = [make_row("dip", right=one_problem), make_row("plain", right=[[0] * 10] * NUM_SEEDS)]
    (entry,) = compare_references(rows, ["dip"], margin=0.01)
    assert entry["problems_p_value"] == entry["p_value"] == 1 and entry["verdict"] == "no difference shown"


def test_equivalence_is_claimed_of_the_nll_alone():
    values = np.linspace(1, 2, NUM_SEEDS)
    same = {"nll": values, "token_ece": values, "aurc": values}
    found = compare_references([make_row("dip", **same), make_row("plain", **same)], ["dip"], margin=0.01)
    verdicts = {entry["figure"]: entry["verdict"] for entry in found}
    assert verdicts == {"nll": "equivalent", "token_ece": "no difference shown", "aurc": "no difference shown"}


def test_each_other_data_set_is_a_family_of_its_own_and_its_right_answers_are_not_compared():
    """That a method has more right answers must hold for other problems too, and theirs are not in a row."""
    nll = np.linspace(1, 2, NUM_SEEDS)
    by_name = {"nll": nll, "svamp NLL": nll, "more_steps NLL": nll, "svamp exact match": nll}
    rows = [make_row("dip", **by_name)]
    rows += [make_row(name, **by_name | {"svamp NLL": nll + 1}) for name in ("plain", "sam", "vib")]
    rows.append(make_row("late", nll=nll))
    found = compare_references(rows, ["dip"], margin=0.01)
    assert compared_figures(found) == ["nll", "svamp NLL", "more_steps NLL"]
    assert claims(found, "svamp NLL") == ["better"] * 3
    assert claims(found, "more_steps NLL") == ["no difference shown"] * 3
    smallest = 2.0 ** (1 - NUM_SEEDS)
    assert [entry["holm_p_value"] for entry in found if entry["figure"] == "svamp NLL"] == pytest.approx(
        [3 * smallest] * 3
    )


def test_shuffled_labels_are_seldom_told_apart():
    """Four names for draws of one kind: of families of three, at most 1% claim a difference, 5 sigma above."""
    generator = np.random.default_rng(0)
    num_draws, num_wrong, num_by_problems = 150, {"nll": 0, "exact_match": 0}, 0
    for _ in range(num_draws):
        runs = [(draw_right(generator), generator.normal(size=NUM_SEEDS)) for _ in range(4)]
        rows = [make_row(f"m{number}", right=right, nll=nll) for number, (right, nll) in enumerate(runs)]
        found = compare_references(rows, ["m0"], margin=1e-6)
        for figure in num_wrong:
            num_wrong[figure] += bool({"better", "worse"} & set(claims(found, figure)))
        num_by_problems += min(entry.get("problems_p_value", 1) for entry in found) < SIGNIFICANCE / 3
    most = SIGNIFICANCE * num_draws + 5 * (SIGNIFICANCE * (1 - SIGNIFICANCE) * num_draws) ** 0.5
    assert max(num_wrong.values()) <= most
    assert num_by_problems > most  # by problems alone, how well a run went would be taken for the method's doing
