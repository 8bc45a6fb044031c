"""The report: what was made, how, on what machine, in what time, and how good it is.

Everything comes from card.json and events.jsonl of one folder. `content` gathers it once; a page, a Markdown file and the
terminal show it.
"""

import json
import re
import time
import unicodedata
from dataclasses import dataclass
from html import escape as html_escape
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.evals.charts import chart, smooth
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder, open_model, write_atomic
from nanoghost.tokenizer.chat_format import text_of

STAGES = {
    "adopt": "as adopted",
    "pretrain": "pretraining",
    "sft": "finetuning",
    "distill": "distillation",
    "rl": "RL",
}


@dataclass(frozen=True)
class ReportSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass(frozen=True)
class Content:
    """What there is to tell of a model."""

    cards: list[ModelCard]
    """Of each stage, the first one first."""
    events: dict[str, list[dict]]
    """By stage; evaluations under their own names (sft-eval)."""

    @property
    def card(self) -> ModelCard:
        return self.cards[-1]

    @property
    def adopted(self) -> bool:
        return self.cards[0].stage == "adopt"

    @property
    def trained(self) -> list[ModelCard]:
        """Cards of what was done here; the pretraining of an adopted model was not."""
        return self.cards[self.adopted :]

    @property
    def counting(self) -> str:
        """What the bits per byte are to be compared with."""
        if self.adopted:
            return "Whether it was trained on the held-out text, its makers alone know."
        floor = self.cards[0].figures["kneser_ney_bpb"]
        return f"Counting byte sequences (Kneser-Ney, order 6) reaches {floor:.3f} bits per byte."

    @property
    def evaluations(self) -> dict[str, dict]:
        """Stage -> the evaluation after it."""
        return {
            c.stage: self.events[f"{c.stage}-eval"][-1] for c in self.cards if f"{c.stage}-eval" in self.events
        }

    def headline(self) -> str:
        base = self.cards[0]
        minutes = sum(c.figures["seconds"] for c in self.trained) / 60
        texts = " and ".join(source["name"] for source in base.data)
        if self.adopted:
            size, m = f"{base.parameters / 1e6:.1f} million parameters", self.card.machine
            here = f"trained on for {minutes:.1f} minutes on {m['cores']} cores ({m['cpu']}, {m['dtype']})"
            return f"{texts}, a model of {size} that others pretrained{', ' + here if self.trained else ''}."
        return (
            f"A {'chat' if len(self.cards) > 1 else 'language'} model of {base.parameters / 1e6:.1f} million parameters,"
            f" made from {texts} in {minutes:.1f} minutes on {base.machine['cores']} cores"
            f" ({base.machine['cpu']}, {base.machine['dtype']})."
        )

    def costs(self) -> list[tuple[str, ...]]:
        """(stage, model, steps, tokens, seconds, tokens per second, PFLOP) of each stage."""
        rows = []
        for c in self.trained:
            f = c.figures
            work = f["flops_per_second"] / f["tokens_per_second"] * f["tokens"] / 1e15 if f["tokens_per_second"] else 0
            rows.append((STAGES[c.stage], c.name, f"{c.steps:,}", f"{f['tokens']:,}", f"{f['seconds']:.0f}",
                         f"{f['tokens'] / max(f['seconds'], 0.1):,.0f}", f"{work:.4f}"))  # fmt: skip
        return rows

    def quality(self) -> tuple[list[str], list[tuple[str, list[str], int]]]:
        """Columns (one a stage) and rows (what, cells, which is best)."""
        found = self.evaluations
        columns = [STAGES[s] for s in found]
        rows = []
        if found:
            bpbs = [e["bpb"] for e in found.values()]
            rows.append(("held-out text, bits per byte", [f"{b:.3f}" for b in bpbs], bpbs.index(min(bpbs))))
            tasks = next(iter(found.values()))["tasks"]
            for task in tasks:
                results = [e["tasks"].get(task) for e in found.values()]
                if all(results):
                    cells = [f"{r['accuracy']:.1%} ({r['low']:.0%} to {r['high']:.0%})" for r in results]
                    best = max(range(len(results)), key=lambda i: results[i]["accuracy"])
                    rows.append((tasks[task]["label"], cells, best))
        return columns, rows

    def facts(self) -> list[tuple[str, str]]:
        base, m = self.cards[0], self.cards[0].machine
        made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.card.finished))
        rows = [("made", made)]
        rows += [
            ("command", c.command) for c in self.cards if c is self.card or c.command != self.card.command
        ]
        rows += [
            ("seed", str(base.seed)),
            (
                "architecture",
                f"{base.arch}: {base.depth_reason or 'as adopted'}; {base.vocab_size:,} tokens of vocabulary",
            ),
            ("parameters", ", ".join(f"{n / 1e6:.2f}M {k}" for k, n in base.parameter_counts.items())),
        ]
        for a in self.card.adapters:
            text = f"rank {a['rank']}, alpha {a['alpha']:g}, beside {', '.join(a['targets'])}"
            rows.append(("adapter", f"{a['parameters'] / 1e6:.2f}M parameters: {text}"))
        if base.compile:
            rows.append(("compiling", f"{'on' if base.compile['on'] else 'off'}: {base.compile['reason']}"))
        rows += [
            ("machine", f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB, {m['dtype']}, {m['threads']} threads"),
            ("versions", ", ".join(f"{k} {v}" for k, v in base.versions.items())),
        ]
        for source in base.data:
            what = "pretrained by others" if self.adopted else "text"
            rows.append((what, f"{source['name']} ({source['license']}): {source['attribution']}"))
        return rows

    def memorised(self) -> str:
        found = self.evaluations
        if not found:
            return ""
        m = list(found.values())[-1]["memorised"]
        return (
            f"Given 16 tokens from 64 places of {'the plays' if self.adopted else 'its training text'}, the longest passage it went on reciting is"
            f" {m['characters']} characters long{' (' + m['source'] + ')' if m['source'] else ''}: “{m['text'].strip()}”"
        )

    def charts(self) -> list[str]:
        """SVG curves of every stage."""
        drawn = []
        pre = self.events.get("pretrain", [])
        loss = smooth([(e["step"], e["loss"]) for e in pre if "loss" in e])
        drawn.append(chart("pretraining: loss, nats per token", {"loss": loss}, "step"))
        validation = [(e["step"], e["validation_bpb"]) for e in pre if "validation_bpb" in e]
        if not self.adopted:
            floor = ("counting (Kneser-Ney)", self.cards[0].figures["kneser_ney_bpb"])
            drawn.append(chart("validation: bits per byte", {"bpb": validation}, "step", level=floor))
        sft = smooth([(e["step"], e["loss"]) for e in self.events.get("sft", [])], 15)
        drawn.append(chart("finetuning: loss on answers", {"loss": sft}, "step"))
        distilled = smooth([(e["step"], e["loss"]) for e in self.events.get("distill", [])], 15)
        drawn.append(chart("distillation: loss", {"loss": distilled}, "step"))
        rl = self.events.get("rl", [])
        tasks = sorted({k for e in rl for k in e if k.startswith("pass_rate_")})
        rates = {k.removeprefix("pass_rate_"): smooth([(e["step"], e[k]) for e in rl], 5) for k in tasks}
        drawn.append(chart("RL: pass rate", rates, "step", percent=True))
        entropy = smooth([(e["step"], e["entropy"]) for e in rl], 5)
        drawn.append(chart("RL: entropy, nats per token", {"entropy": entropy}, "step"))
        length = smooth([(e["step"], e["length"]) for e in rl], 5)
        drawn.append(chart("RL: length, tokens", {"length": length}, "step"))
        return [d for d in drawn if d]


def printable(text: str) -> str:
    """Without control characters (terminals obey them), lone surrogates, and marks that turn the direction of text.

    What models say and what users name their files is not to be trusted.
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)


def escape(text: str) -> str:
    return html_escape(printable(text))


def content(folder: ModelFolder) -> Content:
    events: dict[str, list[dict]] = {}
    for e in folder.events:
        events.setdefault(e["stage"], []).append(e)
    return Content(folder.card.lineage(), events)


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

GHOST = (
    '<svg viewBox="0 0 64 72" aria-hidden="true"><path d="M8 68V30a24 24 0 0 1 48 0v38l-8-7-8 7-8-7-8 7-8-7z" fill="none"'
    ' stroke="var(--a)" stroke-width="3.4" stroke-linejoin="round"/><circle cx="24" cy="31" r="3.6" fill="var(--a)"/>'
    '<circle cx="40" cy="31" r="3.6" fill="var(--a)"/></svg>'
)


def page(c: Content) -> str:
    """report.html: one file, nothing fetched, everything escaped."""
    cells = "".join(
        f'<div style="flex:{k.figures["seconds"]:.1f}">{STAGES[k.stage]} {k.figures["seconds"]:.0f} s</div>'
        for k in c.trained
    )
    parts = [
        f"<header>{GHOST}<div><h1>{escape(c.card.name)}</h1></div></header><p class=lead>{escape(c.headline())}</p>"
    ]
    cost_head = ("stage", "model", "steps", "tokens", "seconds", "tokens/s", "PFLOP")
    if c.trained:
        table = html_table(cost_head, c.costs(), numbers_from=2)
        parts.append(f"<h2>How it was made</h2><div class=strip>{cells}</div>{table}")
    columns, rows = c.quality()
    if rows:
        marked = [(escape(n), *(f"<b>{x}</b>" if i == best else x for i, x in enumerate(xs))) for n, xs, best in rows]
        note = "<p><small>Problems and phrasings that no stage has seen; 95% confidence intervals; greedy decoding. "
        note += c.counting
        parts.append(f"<h2>What it can do</h2>{html_table(('', *columns), marked, escaped=True)}{note}</small></p>")
    if c.trained:
        parts.append(f"<h2>How it learned</h2><div class=curves>{''.join(c.charts())}</div>")
    if c.evaluations:
        talks = "".join(html_talk(s["messages"]) for s in list(c.evaluations.values())[-1]["samples"])
        parts.append(
            f"<h2>What it says</h2>{talks}<p><small>Not chosen: the same five questions at temperature 0.7, one seed.</small></p>"
        )
        parts.append(f"<h2>What it memorised</h2><p>{escape(c.memorised())}</p>")
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in c.facts())
    parts.append(f"<h2>Made with</h2><div class=scroll><table class=facts>{facts}</table></div>")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{escape(c.card.name)}: report</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>\n"
    )


def html_table(head, rows, numbers_from: int = 1, escaped: bool = False) -> str:
    def row(cells, tag):
        marks = ("" if i < numbers_from else " class=n" for i in range(len(cells)))
        return "".join(f"<{tag}{m}>{x if escaped else escape(x)}</{tag}>" for x, m in zip(cells, marks))

    body = "".join(f"<tr>{row(r, 'td')}</tr>" for r in rows)
    return f"<div class=scroll><table><tr>{row(head, 'th')}</tr>{body}</table></div>"


def html_talk(messages: list[dict]) -> str:
    out = []
    for m in messages:
        for call in m.get("tool_calls") or ():
            out.append(
                f"<div class=tool>→ {escape(call['function']['name'])} {escape(call['function']['arguments'])}</div>"
            )
        if m["role"] == "tool":
            out.append(f"<div class=tool>← {escape(text_of(m))}</div>")
        elif text_of(m):
            out.append(f'<div class="said {escape(m["role"])}">{escape(text_of(m))}</div>')
    return f"<div class=talk>{''.join(out)}</div>"


# ── Markdown and terminal ─────────────────────────────────────────────────────────────────────────────────────────────


def markdown(c: Content) -> str:
    """report.md: the same without the curves."""
    lines = [f"# {c.card.name}", "", md(c.headline())]
    if c.trained:
        head = ("stage", "model", "steps", "tokens", "seconds", "tokens/s", "PFLOP")
        lines += ["", "## How it was made", "", *md_table(head, c.costs())]
    columns, rows = c.quality()
    if rows:
        marked = [(name, *(f"**{x}**" if i == best else x for i, x in enumerate(cells))) for name, cells, best in rows]
        lines += ["", "## What it can do", "", *md_table(("", *columns), marked)]
        lines += ["", c.counting]
    if c.evaluations:
        lines += ["", "## What it says", ""]
        for sample in list(c.evaluations.values())[-1]["samples"]:
            for m in sample["messages"]:
                calls = [f"{k['function']['name']} {k['function']['arguments']}" for k in m.get("tool_calls") or ()]
                lines.append(f"- {m['role']}: {md(' '.join([*calls, text_of(m)]))}")
            lines.append("")
        lines += ["## What it memorised", "", md(c.memorised())]
    lines += ["", "## Made with", "", *(f"- {k}: {md(v)}" for k, v in c.facts())]
    return "\n".join(lines) + "\n"


def md(text: str) -> str:
    """Text within a line of Markdown, in which nothing has a meaning."""
    return re.sub(r"([\\`*_\[\]|<>#])", r"\\\1", " ".join(printable(text).split()))


def md_table(head, rows) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines]


def write_report(folder: ModelFolder) -> Path:
    """Write report.html and report.md into the model's folder; returns the page's path."""
    c = content(folder)
    write_atomic(folder.path / "report.md", markdown(c))
    write_atomic(folder.path / "report.html", page(c))
    return folder.path / "report.html"


def terminal_report(folder: ModelFolder) -> None:
    c, console = content(folder), Console(stderr=True)
    console.print(f"\n{c.card.name}: {printable(c.headline())}\n", highlight=False, markup=False)
    columns, rows = c.quality()
    if rows:
        table = Table("", *columns, box=None)
        for name, cells, best in rows:
            table.add_row(name, *(f"[bold]{x}[/bold]" if i == best else x for i, x in enumerate(cells)))
        console.print(table, highlight=False)


def command(settings: ReportSettings) -> None:
    folder = open_model(settings.model)
    path = write_report(folder)
    terminal_report(folder)
    Console(stderr=True).print(f"\n{path}", highlight=False, markup=False, soft_wrap=True)
    if settings.json:
        c = content(folder)
        found = {s: {k: e[k] for k in ("bpb", "tasks", "memorised")} for s, e in c.evaluations.items()}
        print(
            json.dumps(
                {"name": c.card.name, "figures": {k.stage: k.figures for k in c.cards}, "evaluations": found}
            )
        )
