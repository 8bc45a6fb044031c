"""The dream report: one page for a night, with what was learned, what it replaced, figures and examples."""

import time
from html import escape
from pathlib import Path

from nanoghost.evals.report import STYLE
from nanoghost.home import write_atomic

FIGURES = (
    ("recall in wordings kept back", "recall", "{:.0%}"),
    ("refuses what it knows", "refused", "{:.0%}"),
    ("never told: says so", "abstains", "{:.0%}"),
    ("refuses everyday questions", "strayed", "{:.0%}"),
    ("everyday answers moved, nats a token", "nats", "{:.3f}"),
)


def write(path: Path, person: str, night: dict) -> None:
    """`night`: what night.json holds when the night is over."""
    state = "kept" if night["committed"] else "rolled back: " + "; ".join(night["reasons"])
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(night["finished"]))
    rows = "".join(
        f"<tr><td>{name}</td><td>{form.format(night['before'][key])}</td><td>{form.format(night['after'][key])}</td></tr>"
        for name, key, form in FIGURES
    )
    thought, trained = night["thought"], night["trained"]
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(person)}: night {night["number"]}</title><style>{STYLE}</style>
<main><h1>Night {night["number"]}</h1>
<p>{escape(person)}, {when}, {escape(night["base"])}: {escape(state)}. {night["rows"]} facts in all, {thought["dreams"]} dreams
({thought["answers_replaced"]} answers of the teacher were not true and were replaced, {thought["duplicates"]} dreams came twice,
{thought["distinct_trigrams"]:.0%} of their groups of three words differ), {trained["steps"]} steps in {trained["seconds"]:.0f} s.</p>
<h2>Learned</h2>{listed(night["learned"])}
<h2>Corrected</h2>{listed(night["corrected"])}
<h2>Forgotten</h2><p>{night["forgotten"] or "Nothing"}.</p>
<h2>Refused</h2><p>Notes whose value nobody said:</p>{listed(night["untaken"])}<p>Answered wrongly on waking:</p>{pairs(night["after"]["wrong"])}
<h2>Before and after</h2><table><tr><th></th><th>before</th><th>after</th></tr>{rows}</table>
<h2>Asked on waking</h2>{pairs(night["after"]["examples"])}
<h2>Some of the dreams</h2>{pairs(thought["examples"])}
</main></html>
"""
    write_atomic(path, page)


def pairs(asked) -> str:
    rows = "".join(f"<tr><td>{escape(q)}</td><td>{escape(a)}</td></tr>" for q, a in asked)
    return f"<table>{rows}</table>" if rows else "<p>Nothing.</p>"


def listed(texts) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{items}</ul>" if items else "<p>Nothing.</p>"
