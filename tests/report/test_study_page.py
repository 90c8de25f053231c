"""The sentences of a study's report, and its gaps: what the figures say and no more."""

import pytest

from report.study_page import format_markdown, gaps, sentences, write_html


@pytest.fixture
def summary():
    """A study of three methods with one way of answering, as `recipes/study.py` collects it."""
    row = {"answer": "last step", "setting": "lr", "value": 1, "validation_nll": 2.5, "nll": {0: 2.0}, "num_seeds": 1}
    row |= {"files": ["x/results.json"], "mean": 2.0, "std": None, "low": 2.0, "high": 2.0, "train_seconds": 3.0}
    against = {"answer": "last step", "num_pairs": 12, "difference": -0.5, "low": -0.6, "high": -0.4, "p_value": 0.001}
    against |= {"holm_p_value": 0.002, "smallest_p_value": 0.001}
    return {
        "study": {
            "reference": "dip",
            "margin": 0.01,
            "methods": {name: {"values": [0, 1, 2]} for name in ("dip", "sam", "<plain>")},
            "tuning_seeds": [1],
            "seeds": [0],
        },
        "rows": [{**row, "method": name} for name in ("dip", "sam", "<plain>")],
        "comparisons": [
            {**against, "method": "sam", "verdict": "better"},
            {**against, "method": "<plain>", "verdict": "worse"},
        ],
        "missing": [{"cell": "final/sam/seed1", "why": "not run"}],
        "not_tuned": [],
        "num_cells": {"done": 3, "all": 4},
        "commits": ["a"],
        "hardware": ["a CPU"],
    }


def test_a_sentence_has_every_verdict(summary):
    assert sentences(summary) == [
        "Last step: dip is better than sam; worse than <plain> (p < 0.01 after Holm; 12 seeds)."
    ]
    first, second = summary["comparisons"]
    first |= {"verdict": "equivalent", "num_pairs": 11}
    second |= {"verdict": "no difference shown", "smallest_p_value": 0.02}
    (said,) = sentences(summary)
    assert "equivalent to sam within 0.01 nats; not shown to differ from <plain>" in said
    assert "11 to 12 seeds; so few that no difference could be shown, the smallest p is 0.02" in said


def test_without_figures_nothing_is_said(summary, tmp_path):
    summary["comparisons"] = []
    assert sentences(summary) == ["Last step: dip has not been compared with anything yet."]
    summary["rows"], summary["not_tuned"] = [], ["dip"]
    assert "dip is not tuned yet" in sentences(summary)[0] and "in no table: dip" in " ".join(gaps(summary))
    write_html(summary, tmp_path / "study.html")
    assert "No figure yet" in (tmp_path / "study.html").read_text()


def test_a_value_at_the_edge_of_what_was_tried_is_named(summary):
    assert not [text for text in gaps(summary) if "may lie beyond" in text]
    summary["rows"][1]["value"] = 2
    assert "a better one may lie beyond: sam (last step)." in " ".join(gaps(summary))


def test_gaps_and_mixed_origins_are_said(summary):
    summary["commits"] = ["a", "b"]
    summary["hardware"] = ["a CPU", "a GPU"]
    text = format_markdown(summary)
    for said in ("3 of 4 cells", "come from 2 commits: a, b", "different machines", "final/sam/seed1: not run"):
        assert said in text


def test_the_page_is_one_file_and_names_cannot_break_it(summary, tmp_path):
    write_html(summary, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "&lt;plain&gt;" in page and "<plain>" not in page
    assert 'src="data:image/png;base64,' in page and "http" not in page
    assert page.count('<a href="x/results.json">0</a>') == 3
