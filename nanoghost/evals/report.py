"""The report of a model: report.html and report.md in its folder, and a table in the terminal.

Everything comes from card.json and events.jsonl of the folder (report_data.py); a report can be written again any time.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.evals.report_data import TRAINING_COLUMNS, ReportData, printable, report_data
from nanoghost.evals.report_html import html_page
from nanoghost.home import ModelFolder, write_atomic
from nanoghost.tokenizer.chat_format import text_of


def write_report(folder: ModelFolder) -> Path:
    """Write report.html and report.md into the model's folder. Returns the path of the page."""
    data = report_data(folder)
    write_atomic(folder.path / "report.md", markdown(data))
    write_atomic(folder.path / "report.html", html_page(data))
    return folder.path / "report.html"


def print_report(folder: ModelFolder) -> None:
    """Print the headline and the evaluations to the terminal."""
    data = report_data(folder)
    console = Console(stderr=True)
    console.print(f"\n{data.card.name}: {printable(data.headline())}\n", highlight=False, markup=False)
    columns, rows = data.evaluation_table()
    if rows:
        table = Table("", *columns, box=None)
        for row in rows:
            table.add_row(row.label, *row.cells_with_bold_best("[bold]", "[/bold]"))
        console.print(table, highlight=False)


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(data: ReportData) -> str:
    """report.md: the contents of the page without the curves."""
    lines = [f"# {data.card.name}", "", escape_markdown(data.headline())]
    if data.trained_cards:
        lines += ["", "## Training", "", *markdown_table(TRAINING_COLUMNS, data.training_rows())]
    columns, rows = data.evaluation_table()
    if rows:
        cells = [(row.label, *row.cells_with_bold_best("**", "**")) for row in rows]
        lines += ["", "## Evaluation", "", *markdown_table(("", *columns), cells), "", data.baseline_sentence()]
    if data.evaluations:
        lines += ["", "## Samples", ""]
        for sample in data.last_evaluation()["samples"]:
            for message in sample["messages"]:
                functions = [call["function"] for call in message.get("tool_calls") or ()]
                calls = [f"{function['name']} {function['arguments']}" for function in functions]
                lines.append(f"- {message['role']}: {escape_markdown(' '.join([*calls, text_of(message)]))}")
            lines.append("")
        lines += ["## Memorization", "", escape_markdown(data.memorization_sentence())]
    lines += ["", "## Details", "", *(f"- {name}: {escape_markdown(value)}" for name, value in data.details())]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """The text as one line in which no character has a meaning for Markdown."""
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", " ".join(printable(text).split()))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
