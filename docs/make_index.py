"""Write `docs/log/index.md` from the experiments in its folder: `python docs/make_index.py`.

`tests/test_docs.py` fails if the page does not fit its folder.
"""

import re
from pathlib import Path

LOG = Path(__file__).parent / "log"
HEADINGS = ["Question", "Command and commit", "Conditions", "Result", "Conclusion"]

HEAD = """\
<!-- Written by docs/make_index.py; do not edit. -->
# Log of experiments

One file per finished run of an experiment, newest first, negative and failed ones included. An experiment that turned
out wrong is marked as superseded, with a link to what replaced it, and never removed.

To add one, write `docs/log/YYYY-MM-DD-short-name.md` (the date in UTC) with a title and these headings, then run
`python docs/make_index.py`:

* **Question**: what the run was to decide, written before it was started.
* **Command and commit**: the command, and the commit it ran at (`+dirty` if the tree was not clean).
* **Conditions**: hardware, versions where they differ from `constraints.txt`, model, data, seeds, n.
* **Result**: mean and spread over seeds with the unit and which way is better, and the committed result file it can be
  read from.
* **Conclusion**: what was decided, or "undecided" and what would decide it. Its first sentence stands in the table.

| date | experiment | what was decided |
|---|---|---|
"""


def main() -> None:
    """Write the page."""
    (LOG / "index.md").write_text(render(), encoding="utf-8")


def render() -> str:
    """The page, with one row per file."""
    files = sorted(LOG.glob("*-*.md"), reverse=True)
    return HEAD + "".join(row(file.name, file.read_text(encoding="utf-8")) for file in files)


def row(name: str, text: str) -> str:
    """One line of the table.

    Raises:
        ValueError: the file has no date, no title, or other headings than `HEADINGS`.
    """
    date = re.match(r"\d{4}-\d{2}-\d{2}(?=-)", name)
    title = re.match(r"# (.+)\n", text)
    if date is None or title is None:
        raise ValueError(f"docs/log/{name} must be named YYYY-MM-DD-short-name.md and open with `# a title`.")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if headings != HEADINGS:
        raise ValueError(f"docs/log/{name} must have the headings {HEADINGS}, got {headings}.")
    link = f"[{title[1]}]({name})"
    if "**Superseded**" in text:
        link = f"~~{link}~~ (superseded)"
    conclusion = " ".join(text.split("## Conclusion\n")[1].split())
    sentence = re.match(r".+?[.](?= |$)", conclusion)
    return f"| {date[0]} | {link} | {sentence[0] if sentence else conclusion} |\n"


if __name__ == "__main__":
    main()
