"""The report of a study as Markdown and as one HTML page, from the figures that `recipes/study.py` collects."""

import base64
import html
import io
from pathlib import Path

from report.study_pictures import PICTURES
from report.study_tables import Table, TextCell, tables
from report.study_text import are_tested, conditions, gaps, missing_cells, sentences


def format_markdown(summary: dict) -> str:
    """Lay out the report as Markdown, each row with links to its result files."""
    lines = [f"# {_title(summary)}", "", *(f"* {text}" for text in sentences(summary)), ""]
    lines += ["## What limits it", "", *(f"* {text}" for text in gaps(summary)), ""]
    for table in tables(summary):
        lines += [f"## {table.title}", "", table.explanation, "", _markdown_row(map(TextCell, table.header))]
        lines += ["|---" * len(table.header) + "|", *map(_markdown_row, table.rows), ""]
    lines += ["## How it was measured", "", *(f"* {text}" for text in conditions(summary)), ""]
    lines += ["## What is missing", "", *(f"* {text}" for text in missing_cells(summary) or ["Nothing."])]
    return "\n".join(lines) + "\n"


def _markdown_row(cells) -> str:
    texts = (" ".join(f"[{text}]({file})" for text, file in cell.links) or cell.text for cell in cells)
    return f"| {' | '.join(texts)} |".replace("\n", "<br>")


def write_html(summary: dict, path: Path) -> None:
    """Write the report as one HTML file that needs no others but the result files that it links to."""
    drawn = [(title, caption, _picture(draw, title, summary)) for title, caption, draw in PICTURES]
    first = 0 if are_tested(summary) else 1  # without test problems the tuning is what there is
    page = PAGE.format(
        title=html.escape(_title(summary)),
        sentences="".join(map(_sentence, sentences(summary))),
        overview=_overview(*drawn[first]),
        gaps=_list(gaps(summary)),
        tables="".join(map(_table, tables(summary))),
        pictures="".join(
            f"<h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>{picture}"
            for number, (title, caption, picture) in enumerate(drawn)
            if picture and number != first
        ),
        conditions=_list(conditions(summary)),
        missing=_list(missing_cells(summary) or ["Nothing."]),
        versions=html.escape(
            ", ".join(f"{name} {' and '.join(found)}" for name, found in summary["versions"].items())
        ),
        origin=html.escape(f"Commits {', '.join(summary['commits'])}; {', '.join(summary['hardware'])}."),
    )
    path.write_text(page, encoding="utf-8")


def _title(summary: dict) -> str:
    return f"Study: {Path(summary['study']['output_dir']).name}"


def _sentence(text: str) -> str:
    subject, colon, rest = text.partition(":")
    return f"<p><b>{html.escape(subject + colon)}</b>{html.escape(rest)}</p>"


def _overview(title: str, caption: str, picture: str) -> str:
    return f"{picture}<p>{html.escape(title)}. {html.escape(caption)}</p>" if picture else "<p>No figure yet.</p>"


def _list(texts: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in texts)}</ul>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.header)
    rows = "".join(f"<tr>{''.join(map(_table_cell, row))}</tr>" for row in table.rows)
    heading = f"<h2>{html.escape(table.title)}</h2><p>{html.escape(table.explanation)}</p>"
    return f'{heading}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _table_cell(cell: TextCell) -> str:
    links = " ".join(f'<a href="{html.escape(file)}">{html.escape(text)}</a>' for text, file in cell.links)
    kind = f' class="{cell.verdict.split()[0]}"' if cell.verdict else ""
    return f"<td{kind}>{links or html.escape(cell.text)}</td>"


def _picture(draw, description: str, summary: dict) -> str:
    """Draw into the page; nothing where there is nothing to draw."""
    figure = draw(summary)
    if figure is None:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ margin: 2em auto; padding: 0 1em; max-width: 75em; font-family: sans-serif; line-height: 1.4 }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 0.85em }}
td, th {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.5em; text-align: left; vertical-align: top }}
td {{ white-space: pre-line }}
td.better {{ background: #d9f2d9 }}
td.worse {{ background: #f8d7d3 }}
td.equivalent {{ background: #e3ecf8 }}
img {{ max-width: 100% }}
</style></head>
<body>
<h1>{title}</h1>
{sentences}
{overview}
<h2>What limits it</h2>
{gaps}
{tables}
{pictures}
<h2>How it was measured</h2>
{conditions}
<p>{origin} {versions}.</p>
<h2>What is missing</h2>
{missing}
</body>
</html>
"""
