"""What the pages of the repository point to is there. `make docs` checks the site itself, anchors included."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "docs/log", "benchmarks", "eval", "eval/tasks/*", ".")
PAGES = sorted(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists()]


def test_contributing_names_what_there_is():
    named = {name for name in re.findall(r"`([\w./*<>-]+)`", CONTRIBUTING) if "/" in name}
    assert len(named) > 20
    patterns = {name: re.sub(r"(<\w+>|\*)+", "*", name).rstrip("/") for name in named if not name.startswith("runs/")}
    assert not [name for name, pattern in patterns.items() if not any(ROOT.glob(pattern))]


def script(name):
    """Load a script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_index_of_the_log_is_up_to_date():
    written = (ROOT / "docs" / "log" / "index.md").read_text(encoding="utf-8")
    assert written == script("make_index").render(), "run python docs/make_index.py"


def test_the_picture_of_the_studies_shows_what_they_found(monkeypatch, tmp_path):
    draw_studies = script("draw_studies")
    rows = [
        {"method": name, "answer": "one pass", "figures": {"nll": {"values": {"0": 2.0}}}} for name in ("plain", "dip")
    ]
    rows.append({"method": "dip", "answer": "distilled", "figures": {}})  # of no seed yet
    against_plain = {"reference": "dip", "answer": "one pass", "figure": "nll", "method": "plain"}
    against_plain |= {"other_answer": "one pass", "verdict": "better"}
    study = {"rows": rows, "comparisons": [against_plain | {"smallest_p_value": 0.001}]}
    assert draw_studies.verdict(study, ("dip", "one pass"), "nll") == "better"
    assert draw_studies.verdict(study, ("dip", "distilled"), "nll") is None, "another answer"
    assert draw_studies.verdict(study, ("dip", "one pass"), "token_ece") is None, "another figure"
    few = {"rows": rows, "comparisons": [against_plain | {"smallest_p_value": 0.5}]}
    assert draw_studies.verdict(few, ("dip", "one pass"), "nll") is None, "too few seeds to show anything"
    assert draw_studies.change(1.0, 2.0, "nll") == -50 and draw_studies.change(
        0.03, 0.02, "token_ece"
    ) == pytest.approx(1)
    monkeypatch.setattr(draw_studies, "PICTURE", tmp_path / "studies.png")
    draw_studies.main()
    assert (tmp_path / "studies.png").stat().st_size > 10_000
