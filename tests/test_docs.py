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


def test_the_index_of_the_log_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_index", ROOT / "docs" / "make_index.py")
    make_index = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_index)
    written = (ROOT / "docs" / "log" / "index.md").read_text(encoding="utf-8")
    assert written == make_index.render(), "run python docs/make_index.py"
