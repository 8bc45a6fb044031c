"""The report of a night: one HTML page with what was learned and corrected, the figures, and examples."""

import time
from html import escape
from pathlib import Path

from nanoghost.evals.report_html import STYLE
from nanoghost.home import write_atomic
from nanoghost.memory.night_record import NightRecord

FIGURES = (  # label, field of AcceptanceResult, format
    ("recall in held-out phrasings", "recall", "{:.0%}"),
    ("false refusals of stored facts", "false_refusals", "{:.0%}"),
    ("correct abstentions on unanswerable questions", "correct_abstentions", "{:.0%}"),
    ("false refusals of general prompts", "general_false_refusals", "{:.0%}"),
    ("KL of general answers, nats per token", "kl_nats", "{:.3f}"),
)


def write_report(path: Path, person: str, record: NightRecord) -> None:
    """Write the page of a finished night."""
    finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.finished))
    synthesis, training = record.synthesis, record.training
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(person)}: night {record.number}</title><style>{STYLE}</style>
<main><h1>Night {record.number}</h1>
<p>{escape(person)}, {finished}, base model {escape(record.base)}. The new adapter was {escape(record.status)}.</p>
<p>{record.facts} facts, {synthesis.examples} synthetic questions and answers, {training.steps} training steps in
{training.seconds:.0f} s. {synthesis.replaced_answers} incorrect answers of the teacher were replaced and
{synthesis.duplicates} duplicates dropped; {synthesis.distinct_trigrams:.0%} of the word trigrams are distinct.</p>
<h2>New facts</h2>{html_list(record.new_facts)}
<h2>Corrected facts</h2>{html_list(record.corrected_facts)}
<h2>Deleted facts</h2><p>{record.deleted_facts or "None"}.</p>
<h2>Rejected extractions</h2><p>The value does not occur in the message:</p>{html_list(record.rejected_lines)}
<h2>Acceptance test</h2><table><tr><th></th><th>before</th><th>after</th></tr>{figure_rows(record)}</table>
<h2>Wrong answers</h2>{html_table(record.after.wrong_answers)}
<h2>Samples of the acceptance test</h2>{html_table(record.after.samples)}
<h2>Samples of the synthetic questions</h2>{html_table(synthesis.samples)}
</main></html>
"""
    write_atomic(path, page)


def figure_rows(record: NightRecord) -> str:
    rows = []
    for label, name, form in FIGURES:
        before, after = getattr(record.before, name), getattr(record.after, name)
        rows.append(f"<tr><td>{label}</td><td>{form.format(before)}</td><td>{form.format(after)}</td></tr>")
    return "".join(rows)


def html_table(qa_pairs: list[list[str]]) -> str:
    rows = "".join(f"<tr><td>{escape(question)}</td><td>{escape(answer)}</td></tr>" for question, answer in qa_pairs)
    return f"<table>{rows}</table>" if rows else "<p>None.</p>"


def html_list(texts: list[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"
