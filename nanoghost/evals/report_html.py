"""report.html: a report as one HTML file. It loads nothing, and all text in it is escaped."""

from collections.abc import Sequence
from html import escape as html_escape
from pathlib import Path

from nanoghost.evals.report_data import STAGE_TITLES, TRAINING_COLUMNS, ReportData, printable
from nanoghost.formats.model_card import ModelCard
from nanoghost.tokenizer.chat_format import text_of

STYLE = Path(__file__).with_name("report.css").read_text(encoding="utf-8")

GHOST_ICON = (
    '<svg viewBox="0 0 64 72" aria-hidden="true"><path d="M8 68V30a24 24 0 0 1 48 0v38l-8-7-8 7-8-7-8 7-8-7z"'
    ' fill="none" stroke="var(--accent)" stroke-width="3.4" stroke-linejoin="round"/>'
    '<circle cx="24" cy="31" r="3.6" fill="var(--accent)"/><circle cx="40" cy="31" r="3.6" fill="var(--accent)"/></svg>'
)


def html_page(data: ReportData) -> str:
    """The whole page, with its style sheet."""
    title = escape(data.card.name)
    parts = [
        f"<header>{GHOST_ICON}<div><h1>{title}</h1></div></header>",
        f"<p class=lead>{escape(data.headline())}</p>",
    ]
    if data.trained_cards:
        strip = "".join(stage_bar(card) for card in data.trained_cards)
        table = html_table(TRAINING_COLUMNS, escape_rows(data.training_rows()), first_numeric_column=2)
        parts.append(f"<h2>Training</h2><div class=strip>{strip}</div>{table}")
    columns, rows = data.evaluation_table()
    if rows:
        cells = [(escape(row.label), *row.cells_with_bold_best("<b>", "</b>")) for row in rows]
        note = "Held-out problems and phrasings; 95% confidence intervals; greedy decoding."
        table = html_table(("", *columns), cells)
        parts.append(f"<h2>Evaluation</h2>{table}<p><small>{note} {data.baseline_sentence()}</small></p>")
    if data.trained_cards:
        parts.append(f"<h2>Training curves</h2><div class=curves>{''.join(data.charts())}</div>")
    if data.evaluations:
        samples = "".join(conversation_html(sample["messages"]) for sample in data.last_evaluation()["samples"])
        note = "Not selected: five fixed questions, temperature 0.7, one seed."
        parts.append(f"<h2>Samples</h2>{samples}<p><small>{note}</small></p>")
        parts.append(f"<h2>Memorization</h2><p>{escape(data.memorization_sentence())}</p>")
    details = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in data.details())
    parts.append(f"<h2>Details</h2><div class=scroll><table class=facts>{details}</table></div>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{title}: report</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def escape(text: str) -> str:
    """The text as HTML, without control characters."""
    return html_escape(printable(text))


def escape_rows(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [tuple(escape(cell) for cell in row) for row in rows]


def stage_bar(card: ModelCard) -> str:
    """One stage in the strip of stages; its width is proportional to the time that it took."""
    seconds = card.figures["seconds"]
    return f'<div style="flex:{seconds:.1f}">{STAGE_TITLES[card.stage]} {seconds:.0f} s</div>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], first_numeric_column: int = 1) -> str:
    """A table; the cells are HTML. Columns from `first_numeric_column` on are aligned to the right."""

    def table_row(cells: Sequence[str], tag: str) -> str:
        html = ""
        for i, cell in enumerate(cells):
            attribute = " class=n" if i >= first_numeric_column else ""
            html += f"<{tag}{attribute}>{cell}</{tag}>"
        return f"<tr>{html}</tr>"

    body = "".join(table_row(row, "td") for row in rows)
    return f"<div class=scroll><table>{table_row(head, 'th')}{body}</table></div>"


def conversation_html(messages: list[dict]) -> str:
    """Messages in OpenAI's format as bubbles, tool calls and results as lines."""
    parts = []
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(f"<div class=tool>→ {escape(function['name'])} {escape(function['arguments'])}</div>")
        text = escape(text_of(message))
        if message["role"] == "tool":
            parts.append(f"<div class=tool>← {text}</div>")
        elif text:
            parts.append(f'<div class="message {escape(message["role"])}">{text}</div>')
    return f"<div class=talk>{''.join(parts)}</div>"
