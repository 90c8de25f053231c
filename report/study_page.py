"""The report of a study, from the figures that `recipes/study.py` collects: sentences, a table and one HTML page."""

import base64
import html
import io
from pathlib import Path

HEADINGS = (
    "method",
    "answer",
    "tuned value",
    "validation NLL",
    "seeds",
    "NLL",
    "99% interval",
    "reference minus this",
    "its 99% interval",
    "p (Holm)",
    "the reference is",
    "training, s",
)


def sentences(summary: dict) -> list[str]:
    """Say in one sentence per answer what is shown of the reference; nothing that a test or an interval does not."""
    reference, said = summary["study"]["reference"], []
    for answer in dict.fromkeys(row["answer"] for row in summary["rows"] if row["method"] == reference):
        compared = [entry for entry in summary["comparisons"] if entry["answer"] == answer]
        if not compared:
            said.append(f"{answer.capitalize()}: {reference} has not been compared with anything yet.")
            continue
        by_verdict: dict[str, list[str]] = {}
        for entry in compared:
            by_verdict.setdefault(entry["verdict"], []).append(entry["method"])
        wording = {
            "better": "better than {}",
            "worse": "worse than {}",
            "equivalent": f"equivalent to {{}} within {summary['study']['margin']:g} nats",
            "no difference shown": "not shown to differ from {}",
        }
        parts = [text.format(", ".join(by_verdict[name])) for name, text in wording.items() if name in by_verdict]
        seeds = sorted({entry["num_pairs"] for entry in compared})
        smallest = max(entry["smallest_p_value"] for entry in compared)
        conditions = f"{' to '.join(str(number) for number in dict.fromkeys((seeds[0], seeds[-1])))} seeds"
        if smallest >= 0.01:
            conditions += f"; so few that no difference could be shown, the smallest p is {smallest:.2g}"
        said.append(f"{answer.capitalize()}: {reference} is {'; '.join(parts)} (p < 0.01 after Holm; {conditions}).")
    return said or [f"{reference} is not tuned yet, so that nothing can be said."]


def gaps(summary: dict) -> list[str]:
    """Say what is missing."""
    said = [f"{summary['num_cells']['done']} of {summary['num_cells']['all']} cells known so far are done."]
    if summary["not_tuned"]:
        said.append(f"Not tuned yet, and so in no table: {', '.join(summary['not_tuned'])}.")
    values = {name: method["values"] for name, method in summary["study"]["methods"].items()}
    at_edge = [row for row in summary["rows"] if row["value"] in (values[row["method"]][0], values[row["method"]][-1])]
    if at_edge:
        named = ", ".join(f"{row['method']} ({row['answer']})" for row in at_edge)
        said.append(
            f"The best value is the first or the last that was tried, and a better one may lie beyond: {named}."
        )
    if len(summary["commits"]) > 1:
        said.append(f"The cells come from {len(summary['commits'])} commits: {', '.join(summary['commits'])}.")
    if len(summary["hardware"]) > 1:
        said.append(f"The cells come from different machines, and times do not compare: {summary['hardware']}.")
    return said


def conditions(summary: dict) -> str:
    """Say how the methods were compared."""
    study = summary["study"]
    num_trials = len(study["methods"][study["reference"]]["values"])
    return (
        f"NLL in nats per answer token, lower is better. Each of {len(study['methods'])} methods was tuned by "
        f"{num_trials} values of one setting with {len(study['tuning_seeds'])} seed(s) on validation problems; each "
        "way of answering takes the value that was best for it. Differences are paired by seed: Wilcoxon's "
        "signed-rank test, Holm's correction over the methods of one way of answering; intervals are by bootstrap."
    )


def format_markdown(summary: dict) -> str:
    """Lay out the report as Markdown, each row with links to its result files."""
    lines = ["# Study", "", *(f"* {text}" for text in sentences(summary)), "", conditions(summary), ""]
    lines += [f"| {' | '.join(HEADINGS)} | files |", "|---" * (len(HEADINGS) + 1) + "|"]
    for row, cells in zip(summary["rows"], _cells(summary), strict=True):
        links = " ".join(f"[{seed}]({file})" for seed, file in zip(row["nll"], row["files"], strict=True))
        lines.append(f"| {' | '.join(cells)} | {links} |")
    lines += ["", "## What is missing", "", *(f"* {text}" for text in gaps(summary))]
    lines += [f"* {gap['cell']}: {gap['why']}" for gap in summary["missing"]]
    return "\n".join(lines) + "\n"


def write_html(summary: dict, path: Path) -> None:
    """Write the report as one HTML file that needs no others but the result files that it links to."""
    escape = html.escape
    head = "".join(f"<th>{escape(heading)}</th>" for heading in (*HEADINGS, "files"))
    rows = []
    for row, cells in zip(summary["rows"], _cells(summary), strict=True):
        links = " ".join(
            f'<a href="{escape(file)}">{seed}</a>' for seed, file in zip(row["nll"], row["files"], strict=True)
        )
        rows.append(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}<td>{links}</td></tr>")
    page = PAGE.format(
        sentences="".join(f"<p><b>{escape(text)}</b></p>" for text in sentences(summary)),
        conditions=escape(conditions(summary)),
        picture=_picture(summary),
        head=head,
        rows="".join(rows),
        gaps="".join(f"<li>{escape(text)}</li>" for text in gaps(summary)),
        missing="".join(f"<li>{escape(gap['cell'])}: {escape(gap['why'])}</li>" for gap in summary["missing"]),
    )
    path.write_text(page, encoding="utf-8")


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Study</title>
<style>
body {{ margin: 2em auto; max-width: 75em; font-family: sans-serif }}
table {{ border-collapse: collapse; font-size: 0.85em }}
td, th {{ border-bottom: 1px solid #ccc; padding: 0.3em 0.5em; text-align: left }}
img {{ max-width: 100% }}
</style></head>
<body>
<h1>Study</h1>
{sentences}
{picture}
<p>{conditions}</p>
<ul>{gaps}</ul>
<table><tr>{head}</tr>{rows}</table>
<h2>What is missing</h2>
<ul>{missing}</ul>
</body>
</html>
"""


def _cells(summary: dict) -> list[tuple[str, ...]]:
    """The table's rows as text; a gap is a dash."""
    compared = {(entry["method"], entry["answer"]): entry for entry in summary["comparisons"]}
    lines: list[tuple[str, ...]] = []
    for row in summary["rows"]:
        entry = compared.get((row["method"], row["answer"]))
        nll = interval = seconds = difference = of_difference = p_value = "-"
        verdict = "this" if row["method"] == summary["study"]["reference"] else "-"
        if row["num_seeds"]:
            spread = "" if row["std"] is None else f" ± {row['std']:.4f}"
            nll, interval = f"{row['mean']:.4f}{spread}", f"{row['low']:.4f} to {row['high']:.4f}"
            seconds = f"{row['train_seconds']:.0f}"
        if entry is not None:
            difference, of_difference = f"{entry['difference']:+.4f}", f"{entry['low']:+.4f} to {entry['high']:+.4f}"
            p_value, verdict = f"{entry['holm_p_value']:.2g}", entry["verdict"]
        seeds = f"{row['num_seeds']} of {len(summary['study']['seeds'])}"
        lines.append(
            (row["method"], row["answer"], f"{row['setting']}={row['value']}", f"{row['validation_nll']:.4f}", seeds)
            + (nll, interval, difference, of_difference, p_value, verdict, seconds)
        )
    return lines


def _picture(summary: dict) -> str:
    """Draw each row's mean and interval; methods from the best to the worst, a colour for each way of answering."""
    from matplotlib.figure import Figure

    rows = sorted((row for row in summary["rows"] if row["num_seeds"]), key=lambda row: -row["mean"])
    if not rows:
        return "<p>No figure yet.</p>"
    best = {row["method"]: row["mean"] for row in rows}  # the last of a method is its best
    methods = sorted(best, key=lambda method: -best[method])
    answers = list(dict.fromkeys(row["answer"] for row in summary["rows"]))
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(methods)), layout="constrained")
    axes = figure.subplots()
    for number, answer in enumerate(answers):
        of_answer = [row for row in rows if row["answer"] == answer]
        if not of_answer:
            continue
        means = [row["mean"] for row in of_answer]
        errors = [[row["mean"] - row["low"] for row in of_answer], [row["high"] - row["mean"] for row in of_answer]]
        places = [methods.index(row["method"]) + 0.18 * (1 - number) for row in of_answer]
        axes.errorbar(means, places, xerr=errors, fmt="o", color=f"C{number}", capsize=3, label=answer)
    reference = summary["study"]["reference"]
    axes.set_yticks(range(len(methods)), methods)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == reference else "normal")
    axes.set(xlabel="NLL per answer token of the test problems, mean over seeds and its 99% interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(answers), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<img alt="NLL by method" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
