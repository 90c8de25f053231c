"""The sentences, tables and pictures of a study's report: what the figures say and no more."""

import re

import pytest

from report.study_page import format_markdown, write_html
from report.study_pictures import PICTURES, draw_overview
from report.study_text import conditions, gaps, missing_cells, sentences, tables


def row(method, answer="one pass", nll=2.0, **changed):
    """A row of two seeds with every figure."""
    values = {"values": {"0": nll, "1": nll}, "mean": nll, "std": 0.0, "low": nll - 0.1, "high": nll + 0.1}
    figures = dict.fromkeys(("nll", "token_ece", "token_brier", "exact_match", "aurc", "svamp NLL"), values)
    bins = [{"confidence": 0.5, "accuracy": 0.4, "count": 3}]
    made = {"method": method, "answer": answer, "num_passes": 8 if answer == "mean of 8" else 1, "num_seeds": 2}
    made |= {"setting": "lr", "value": 1, "validation_nll": 2.5, "train_seconds": 3.0, "relative_seconds": 1.5}
    made |= {"files": {"0": f"{answer[:3]}/0/result.json", "1": "x/1/result.json"}, "figures": figures, "right": {}}
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
    made |= {"num_pairs": 12, "difference": -0.5, "low": -0.6, "high": -0.4, "p_value": 0.001}
    return made | {"holm_p_value": 0.002, "smallest_p_value": 0.001} | changed


@pytest.fixture
def summary():
    """A study of three methods, as `recipes/study.py` collects it."""
    methods = ("dip", "sam", "<plain>")
    return {
        "study": {
            "output_dir": "results/study/tiny",
            "references": ["dip"],
            "margin": 0.01,
            "methods": {name: {"setting": "lr", "values": [0, 1, 2]} for name in methods},
            "tuning_seeds": [1],
            "seeds": [0, 1],
        },
        "rows": [*map(row, methods), row("dip", "mean of 8", nll=1.5)],
        "comparisons": [comparison("sam", "better"), comparison("<plain>", "worse")],
        "tuning": {
            name: {"values": [0, 1, 2], "nll": {"one pass": [2.7, 2.5, 2.6]}, "files": {"0, 1": "t/result.json"}}
            for name in methods
        },
        "missing": [{"cell": f"final/sam/1/seed{seed}", "why": "not run"} for seed in (1, 2)],
        "not_tuned": [],
        "num_cells": {"done": 3, "all": 4},
        "commits": ["a"],
        "hardware": ["a CPU"],
        "versions": {"torch": "2"},
    }


def test_a_sentence_has_every_verdict(summary):
    first, second = sentences(summary)
    said = "dip, one pass: NLL 2, better than sam; worse than <plain>"
    assert first == f"{said} (12 seeds; training takes 1.5 × the time of plain)."
    assert second == "dip, mean of 8: not compared with anything yet."
    summary["comparisons"] = [
        comparison("sam", "equivalent", num_pairs=11),
        comparison("sam", "better", other_answer="distilled"),
        comparison("<plain>", "no difference shown", figure="token_ece", smallest_p_value=0.02),
    ]
    said = sentences(summary)[0]
    assert "NLL 2, better than sam (distilled); equivalent to sam within 0.01 nats. Token ECE 2, not shown to" in said
    assert "11 to 12 seeds, too few to show every difference: the least possible p is 0.02" in said


def test_a_sentence_counts_what_it_cannot_name(summary):
    summary["comparisons"] = [comparison(f"m{number}", "better") for number in range(5)]
    assert "NLL 2, better than all 5 others (" in sentences(summary)[0]
    summary["comparisons"].append(comparison("sam", "worse"))
    assert "NLL 2, better than 5 of 6 others; worse than sam (" in sentences(summary)[0]


def test_the_sentences_give_the_figure_of_plain(summary):
    summary["rows"].append(row("plain", nll=2.71828))
    assert sentences(summary)[0].startswith("dip, one pass: NLL 2 (plain in one pass: 2.718), better than")
    summary["study"]["references"] = ["plain"]
    summary["rows"] = summary["rows"][1:]
    for entry in summary["comparisons"]:
        entry["reference"] = "plain"
    assert sentences(summary)[0].startswith("plain, one pass: NLL 2.718, better than")


def test_without_figures_nothing_is_said(summary, tmp_path):
    summary |= {"rows": [], "comparisons": [], "tuning": {}, "not_tuned": ["dip"]}
    assert sentences(summary) == ["dip: not tuned yet, so that nothing can be said."]
    assert "in no table: dip" in " ".join(gaps(summary)) and not tables(summary)
    write_html(summary, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "No figure yet" in page and "data:image" not in page


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
    by_title = {table.title: table for table in tables(summary)}
    assert list(by_title) == [
        "Held-out problems",
        "Generated answers",
        "Another distribution",
        "dip, one pass, against the others",
        "Settings and cost",
        "Tuning",
    ]
    assert by_title["Another distribution"].header[-2:] == ("svamp NLL", "result files")
    for title in ("Held-out problems", "Generated answers", "Another distribution"):
        first = by_title[title].rows[0]
        assert len(by_title[title].rows) == 4 and "2.0000 ± 0.0000\n1.9000 to 2.1000" in [cell.text for cell in first]
        assert first[-1].links == (("0", "one/0/result.json"), ("1", "x/1/result.json"))
    against = by_title["dip, one pass, against the others"]
    assert against.header == ("other", "its answer", "NLL", "AURC", "its result files")
    assert all(cells[-1].links[1] == ("1", "x/1/result.json") for cells in against.rows)
    assert [[cell.text for cell in cells[:-1]] for cells in against.rows] == [
        [
            "sam",
            "one pass",
            "-0.5000\n-0.6000 to -0.4000\np = 0.002: better",
            "-0.5000\n-0.6000 to -0.4000\np = 0.25: no difference shown",
        ],
        ["<plain>", "one pass", "-0.5000\n-0.6000 to -0.4000\np = 0.002: worse", "-"],
    ]
    costs = [cell.text for cell in by_title["Settings and cost"].rows[-1]]
    assert costs[:-1] == ["dip", "mean of 8", "2 of 2", "lr=1", "2.5000", "3 s", "1.50", "8"]
    assert by_title["Tuning"].rows[0][-2].text == "0: 2.7000, 1: 2.5000, 2: 2.6000"


def test_a_figure_that_lacks_seeds_says_of_how_many_it_is(summary):
    summary["rows"][0]["num_seeds"] = 3
    cells = [cell.text for cell in tables(summary)[0].rows[0]]
    assert cells[2:4] == ["3 of 2", "2.0000 ± 0.0000, n = 2\n1.9000 to 2.1000"]


def test_every_picture_is_drawn_where_it_has_data_and_only_there(summary):
    assert all(draw(summary) is not None for _, _, draw in PICTURES)
    bare = {"curves": None, "validation": [], "noise": None, "relative_seconds": None}
    summary["rows"] = [made | bare for made in summary["rows"]]
    assert [draw(summary) for _, _, draw in PICTURES] == [None] * len(PICTURES)
    assert len(draw_overview(summary).axes) == 2


def test_the_page_is_one_file_and_names_cannot_break_it(summary, tmp_path):
    write_html(summary, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "&lt;plain&gt;" in page and "<plain>" not in page
    assert page.count('src="data:image/png;base64,') == 1 + len(PICTURES) and "http" not in page
    files = {"one/0/result.json", "mea/0/result.json", "x/1/result.json", "t/result.json"}
    assert set(re.findall(r'href="([^"]*)"', page)) == files
    assert page.index("<b>dip, one pass:</b> NLL") < page.index("data:image") < page.index("<table>")
    assert all(text.split("'")[0] in page for text in conditions(summary))


def test_markdown_has_the_same_tables(summary):
    text = format_markdown(summary)
    for table in tables(summary):
        assert f"## {table.title}\n" in text and f"| {' | '.join(table.header)} |" in text
    assert (
        "| 2.0000 ± 0.0000<br>1.9000 to 2.1000 |" in text and "[0](one/0/result.json) [1](x/1/result.json) |" in text
    )
