"""The sentences, tables and pictures of a study's report: what the figures say and no more."""

import re

import pytest

from report.study_page import format_markdown, write_html
from report.study_pictures import PICTURES, draw_tuning
from report.study_rows import SMOOTHNESS, Time
from report.study_tables import tables
from report.study_text import are_tested, conditions, gaps, missing_cells, sentences


def row(method, answer="one pass", nll=2.0, **changed):
    """A row of two seeds with every figure."""
    values = {"values": {"0": nll, "1": nll}, "mean": nll, "std": 0.0, "low": nll - 0.1, "high": nll + 0.1}
    figures = dict.fromkeys(
        ("nll", "token_ece", "token_brier", "exact_match", "aurc", "svamp NLL", *SMOOTHNESS), values
    )
    bins = [{"confidence": 0.5, "accuracy": 0.4, "count": 3}]
    made = {"method": method, "answer": answer, "num_passes": 8 if answer == "mean of 8" else 1, "num_seeds": 2}
    made |= {
        "setting": "lr",
        "value": 1,
        "validation_nll": 2.5,
        "times": {"a CPU": {"0": Time(seconds=2.0, ended=0.0), "1": Time(seconds=4.0, ended=0.0)}},
        "relative_seconds": 1.5,
    }
    made |= {
        "files": {"0": f"{answer[:3]}/0/result.json", "1": "x/1/result.json"},
        "figures": figures,
        "right": {},
        "diverged": [],
    }
    made |= {"curves": {"reliability": bins, "risk_coverage": [[0.5, 0.1], [1.0, 0.2]]}}
    made |= {"validation": [{"step": 1, "nll": 3.0}], "noise": [{"name": "layer", "relative_std": 1.5}]}
    return made | changed


def comparison(method, verdict, figure="nll", answer="one pass", **changed):
    """The reference against a method."""
    made = {
        "reference": "dip",
        "answer": answer,
        "method": method,
        "other_answer": answer,
        "figure": figure,
        "verdict": verdict,
    }
    made |= {"num_pairs": 12, "difference": -0.5, "low": -0.6, "high": -0.4, "p_value": 0.001, "other_mean": 2.5}
    return made | {"holm_p_value": 0.002, "smallest_p_value": 0.001} | changed


@pytest.fixture
def summary():
    """A study of four methods, as `recipes/study.py` collects it."""
    methods = ("dip", "sam", "plain", "<noise>")
    return {
        "study": {
            "output_dir": "results/study/tiny",
            "references": ["dip"],
            "margin": 0.01,
            "num_smoothness_problems": 16,
            "methods": {name: {"setting": "lr", "values": [0, 1, 2]} for name in methods},
            "tuning_seeds": [1],
            "seeds": [0, 1],
        },
        "rows": [
            row("dip"),
            row("sam", nll=2.1),
            row("plain", nll=2.2, relative_seconds=1.0),
            row("<noise>", nll=2.3, relative_seconds=2.01),
            row("dip", "mean of 8", nll=1.5),
        ],
        "comparisons": [comparison("sam", "better"), comparison("<noise>", "worse")],
        "tuning": {
            name: {"values": [0, 1, 2], "nll": {"one pass": [2.7, least, 2.6]}, "files": {"0, 1": "t/result.json"}}
            for name, least in zip(methods, (2.5, 2.4, 2.55, 2.58), strict=True)
        },
        "missing": [{"cell": f"final/sam/1/seed{seed}", "why": "not run"} for seed in (1, 2)],
        "not_tuned": [],
        "num_cells": {"done": 3, "all": 4},
        "commits": ["a"],
        "hardware": ["a CPU"],
        "versions": {"torch": "2"},
    }


def test_the_first_sentences_say_what_is_shown_and_no_more(summary):
    summary["comparisons"] = [
        comparison("plain", "better"),
        comparison("plain", "worse", figure="token_ece", difference=0.25),
        comparison("plain", "better", figure="exact_match", difference=0.0123, other_mean=0.4),
        comparison("plain", "better", answer="mean of 8", figure="token_ece"),
        comparison("sam", "equivalent", num_pairs=11),
        comparison("sam", "no difference shown", figure="token_ece"),
        comparison("sam", "no difference shown", figure="exact_match"),
        comparison("sam", "better", other_answer="distilled"),
    ]
    against_plain, against_best, cost = sentences(summary)
    assert against_plain == (
        "Against plain (12 seeds): dip has 20.0% less loss, 1.2 points more right answers and 10.0% more calibration "
        "error (p < 0.01)."
    )
    assert against_best == (
        "Against sam, the best other method (11 to 12 seeds): dip has the same loss within 0.01 nats and is not shown "
        "to differ in calibration error and right answers."
    )
    assert cost == (
        "Cost: dip takes 1.5 × plain's training time; an answer takes one pass. Of 3 ways to answer in one pass after "
        "at most 2 times plain's training time, dip has the least mean loss, less than 1 of the 2 others (p < 0.01)."
    )


def test_the_first_sentences_are_said_of_each_reference(summary):
    summary["study"]["references"] = ["dip", "sam"]
    summary["comparisons"] = [comparison("plain", "better", reference="sam", difference=-0.25)]
    against_plain, against_best, cost = sentences(summary)
    assert against_plain == (
        "Against plain (12 seeds): sam has 10.0% less loss (p < 0.01). dip has 2.0% less loss on validation problems, "
        "with one seed, which shows nothing yet."
    )
    assert against_best == (
        "Against <noise>, the best other method: dip has 3.1% less loss and sam has 7.0% less loss on validation "
        "problems, with one seed, which shows nothing yet."
    )
    assert cost.startswith("Cost: dip takes 1.5 × and sam takes 1.5 × plain's training time; ")


def test_few_seeds_and_the_tuning_alone_show_nothing(summary):
    summary["comparisons"] = [comparison("plain", "no difference shown", smallest_p_value=0.25, num_pairs=3)]
    assert sentences(summary)[:2] == [
        "Against plain (3 seeds): dip has 20.0% less loss so far, which so few seeds cannot tell from chance.",
        "Against sam, the best other method: dip has 4.2% more loss on validation problems, with one seed, which "
        "shows nothing yet.",
    ]
    assert are_tested(summary)
    summary["comparisons"] = []
    assert "on validation problems" in sentences(summary)[0] and not are_tested(summary)


def test_without_figures_nothing_is_said(summary, tmp_path):
    summary |= {"rows": [], "comparisons": [], "tuning": {}, "not_tuned": ["dip"]}
    assert sentences(summary) == ["Against plain: nothing can be said yet.", "Cost: no times to compare yet."]
    assert "in no table: dip" in " ".join(gaps(summary)) and not tables(summary)
    write_html(summary, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "No figure yet" in page and "data:image" not in page


def test_the_order_of_the_validation_problems_is_compared_with_that_of_the_test_problems(summary):
    """By the runs with all seeds the same order, by the tuning the opposite one."""
    by_nll = {f"method{nll}": float(nll) for nll in range(1, 6)}
    summary["rows"] = [row(name, nll=nll, validation_nll=-nll) for name, nll in by_nll.items()]
    for given in summary["rows"]:
        given["figures"]["best_validation_nll"] = given["figures"]["nll"]
    (table,) = (table for table in tables(summary) if table.title == "Held-out problems")
    assert "of these 5 methods' NLL with it is +1.00, and with the NLL of their tuning -1.00" in table.explanation
    summary["rows"].pop()
    assert not any("correlation" in table.explanation for table in tables(summary)), "four are in order by chance"


def test_smoothness_is_laid_out_with_its_rank_correlation_with_the_loss(summary):
    summary["rows"] += [row(f"method {number}", nll=3.0 + number) for number in range(4)]
    for number, found in enumerate(summary["rows"]):
        figures = found["figures"]
        figures["weight_noise_rise"] = {**figures["nll"], "mean": -figures["nll"]["mean"]}
        figures["layer_noise_rise"] = {**figures["nll"], "mean": 0.1 * number**2 - number}
    del summary["rows"][-1]["figures"]["lipschitz"]  # was not measured
    (table,) = (table for table in tables(summary) if table.title == "Smoothness beside generalization")
    assert len(table.rows) == len(summary["rows"]) - 1
    assert "Lipschitz constant +1.00" in table.explanation and "noise in the weights -1.00" in table.explanation
    assert "first 16 test problems" in table.explanation
    del summary["rows"][4:]
    assert not any("correlation" in table.explanation for table in tables(summary)), "four are in order by chance"
    for found in summary["rows"]:
        found["figures"].pop("lipschitz", None)
    assert "Smoothness beside generalization" not in {table.title for table in tables(summary)}


@pytest.mark.parametrize(
    ("values", "value", "is_named"),
    [
        ([0, 1, 2], 1, False),
        ([0, 1, 2], 2, True),
        ([0, 1, 2], 0, False),  # nothing is below 0
        ([0.5, 1, 2], 0.5, True),
        (["auto", 1, 2], "auto", False),
        (["auto", 1, 2], 1, True),
    ],
)
def test_a_value_at_the_edge_of_what_was_tried_is_named(summary, values, value, is_named):
    summary["study"]["methods"]["sam"]["values"], summary["rows"][1]["value"] = values, value
    assert ("a better one may lie beyond: sam (one pass)." in " ".join(gaps(summary))) == is_named


def test_what_only_the_tuning_has_is_named(summary):
    assert "not run on the test problems" not in " ".join(gaps(summary))
    summary["rows"] = [made for made in summary["rows"] if made["method"] != "sam"]
    assert "not run on the test problems, as the best on validation are: sam." in " ".join(gaps(summary))
    summary["not_tuned"] = ["vib"]  # which may be better than any
    assert "known once all are tuned: sam." in " ".join(gaps(summary))


def test_gaps_and_mixed_origins_are_said(summary):
    summary |= {"commits": ["a", "b"], "hardware": ["a CPU", "a GPU"]}
    summary["rows"].append(
        row(
            "deep ensemble of 4 (plain)",
            "mean of 4",
            is_deep_ensemble=True,
            num_seeds=0,
            figures={},
            validation_nll=None,
        )
    )
    text = format_markdown(summary)
    for said in (
        "3 of 4 cells",
        "come from 2 commits: a, b",
        "different machines",
        "No deep ensemble of 4 (plain)",
        "final/sam: 2 cells not run",
    ):
        assert said in text
    assert missing_cells(summary) == ["final/sam: 2 cells not run"]


def test_the_tables_have_every_figure_and_every_comparison(summary):
    summary["comparisons"].append(
        comparison("sam", "no difference shown", "aurc", holm_p_value=0.25, smallest_p_value=1)
    )
    summary["comparisons"].append(comparison("<noise>", "better", "svamp NLL"))
    by_title = {table.title: table for table in tables(summary)}
    assert list(by_title) == [
        "What is shown",
        "Equal cost",
        "Held-out problems",
        "Generated answers",
        "Another distribution",
        "Smoothness beside generalization",
        "dip, one pass, against the others",
        "Settings and cost",
        "Tuning",
    ]
    assert by_title["Another distribution"].header[-2:] == ("svamp NLL", "result files")
    for title in ("Held-out problems", "Generated answers", "Another distribution"):
        first = by_title[title].rows[0]
        assert len(by_title[title].rows) == 5 and "2.0000 ± 0.0000\n1.9000 to 2.1000" in [cell.text for cell in first]
        assert first[-1].links == (("0", "one/0/result.json"), ("1", "x/1/result.json"))
    against = by_title["dip, one pass, against the others"]
    assert against.header == ("other", "its answer", "NLL", "AURC", "svamp NLL", "its result files")
    assert all(cells[-1].links[1] == ("1", "x/1/result.json") for cells in against.rows)
    assert [[cell.text for cell in cells[:-1]] for cells in against.rows] == [
        [
            "sam",
            "one pass",
            "-0.5000\n-0.6000 to -0.4000\np = 0.002: better",
            "-0.5000\n-0.6000 to -0.4000\np = 0.25: no difference shown",
            "-",
        ],
        [
            "<noise>",
            "one pass",
            "-0.5000\n-0.6000 to -0.4000\np = 0.002: worse",
            "-",
            "-0.5000\n-0.6000 to -0.4000\np = 0.002: better",
        ],
    ]
    costs = [cell.text for cell in by_title["Settings and cost"].rows[-1]]
    assert costs[:-1] == ["dip", "mean of 8", "2 of 2", "lr=1", "2.5000", "3 s on a CPU, n = 2", "1.50", "8"]


def test_what_is_shown_is_counted_by_verdict(summary):
    summary["rows"].append(row("sam", "distilled"))
    summary["comparisons"] += [
        comparison("sam", "better", other_answer="distilled"),
        comparison("sam", "no difference shown", "aurc", smallest_p_value=0.5),
    ]
    table = tables(summary)[0]
    assert table.header == ("method", "answer", "NLL", "AURC")
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        [
            "dip",
            "one pass",
            "better than sam, sam (distilled)\nworse than <noise>",
            "not shown to differ from sam\n(too few seeds: the least possible p is 0.5)",
        ]
    ]


def test_equal_cost_is_one_pass_and_at_most_twice_the_time(summary):
    table = next(table for table in tables(summary) if table.title == "Equal cost")
    assert "Over it: <noise> 2.01." in table.explanation
    against = "-0.5000\n-0.6000 to -0.4000\np = 0.002: better"
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        ["dip", "one pass", "2 of 2", "1.50", "2.0000", "2.0000", "2.0000", "-"],
        ["sam", "one pass", "2 of 2", "1.50", "2.1000", "2.1000", "2.1000", against],
        ["plain", "one pass", "2 of 2", "1.00", "2.2000", "2.2000", "2.2000", "-"],
    ]


def test_at_equal_time_plain_training_is_longer_or_an_ensemble(summary):
    ensemble = {"is_deep_ensemble": True, "relative_seconds": 8.0, "nll": 1.75}
    summary["rows"] += [
        row("plain_twice_as_long", nll=2.5, relative_seconds=2.0),
        row("deep ensemble of 8 (plain)", "mean of 8", **ensemble),
    ]
    summary["comparisons"].append(comparison("plain_twice_as_long", "better"))
    table = next(table for table in tables(summary) if table.title.startswith("Plain training at equal"))
    against = "-0.5000\n-0.6000 to -0.4000\np = 0.002: better"
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        ["dip", "1.50", "2.0000", "plain_twice_as_long", "2.00", "2.5000", against],
        ["dip (mean of 8)", "1.50", "1.5000", "deep ensemble of 8 (plain)", "8.00", "1.7500", "-"],
    ]


def test_the_tuning_is_in_full_the_best_method_first(summary):
    rows = tables(summary)[-1].rows
    assert [cells[0].text for cells in rows] == ["sam", "dip", "plain", "<noise>"]
    assert [cell.text for cell in rows[1][:-1]] == [
        "dip",
        "one pass",
        "2.5000",
        "lr=1",
        "0: 2.7000, 1: 2.5000, 2: 2.6000",
    ]


def test_right_answers_have_the_p_value_over_problems_too(summary):
    summary["comparisons"] = [comparison("sam", "no difference shown", "exact_match", problems_p_value=0.3)]
    by_title = {table.title: table for table in tables(summary)}
    (cells,) = by_title["dip, one pass, against the others"].rows
    assert cells[2].text.endswith("p = 0.002 (0.3 over problems): no difference shown")


def test_a_figure_that_lacks_seeds_says_of_how_many_it_is(summary):
    summary["rows"][0]["num_seeds"] = 3
    by_title = {table.title: table for table in tables(summary)}
    cells = [cell.text for cell in by_title["Held-out problems"].rows[0]]
    assert cells[2:4] == ["3 of 2", "2.0000 ± 0.0000, n = 2\n1.9000 to 2.1000"]


def test_every_picture_is_drawn_where_it_has_data_and_only_there(summary):
    assert all(draw(summary) is not None for _, _, draw in PICTURES)
    bare = {"curves": None, "validation": [], "noise": None, "relative_seconds": None}
    summary["rows"], summary["tuning"] = [made | bare | {"figures": {}} for made in summary["rows"]], {}
    assert [draw(summary) for _, _, draw in PICTURES] == [None] * len(PICTURES)


def test_the_tuning_has_a_dot_per_value_and_an_arrow_for_what_is_far_off(summary):
    summary["tuning"]["sam"]["nll"] = {"one pass": [2.4, 9.0, 2.5], "mean of 8": [2.5, 2.45, 2.6]}
    (axes,) = draw_tuning(summary).axes
    dots = [line for line in axes.lines if len(line.get_xdata())]
    assert len(dots) == 3 * 5 and [line.get_marker() for line in dots].count(">") == 4  # beyond 2.67
    assert axes.get_yticklabels()[2].get_text() == "dip"


def test_the_first_picture_is_the_tuning_until_test_problems_say_something(summary, tmp_path):
    summary["comparisons"] = [comparison("plain", "better")]
    for title in ("NLL and calibration on the test problems", "The tuning"):
        write_html(summary, tmp_path / "study.html")
        page = (tmp_path / "study.html").read_text()
        assert page.index(f'alt="{title}"') == page.index("alt=") and page.count(f'alt="{title}"') == 1
        summary["comparisons"] = []


def test_the_page_is_one_file_and_names_cannot_break_it(summary, tmp_path):
    write_html(summary, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "&lt;noise&gt;" in page and "<noise>" not in page
    assert page.count('src="data:image/png;base64,') == len(PICTURES) and "http" not in page
    files = {"one/0/result.json", "mea/0/result.json", "x/1/result.json", "t/result.json"}
    assert set(re.findall(r'href="([^"]*)"', page)) == files
    assert page.index("<b>Against plain:</b> dip has") < page.index("data:image") < page.index("<table>")
    assert all(text.split("'")[0] in page for text in conditions(summary))


def test_markdown_has_the_same_tables(summary):
    text = format_markdown(summary)
    for table in tables(summary):
        assert f"## {table.title}\n" in text and f"| {' | '.join(table.header)} |" in text
    assert (
        "| 2.0000 ± 0.0000<br>1.9000 to 2.1000 |" in text and "[0](one/0/result.json) [1](x/1/result.json) |" in text
    )
