"""The live display: a bar for each stage, drawn from the same events that go into events.jsonl."""

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

NAMES = {
    "pretrain": "pretraining",
    "sft": "finetuning",
    "rl": "reinforcement",
    "distill": "distillation",
    "think": "thinking",
    "sleep": "sleep",
    "lecun1989": "digits",
    "ledger": "ledger",
}


class Display:
    """Call it with events. On a terminal it draws a bar; into a file it writes a line every ten seconds."""

    def __init__(self):
        self.console = Console(
            stderr=True, quiet=os.environ.get("RANK", "0") != "0"
        )  # of several processes the first one speaks
        self.progress, self.task, self.stage = None, None, None
        self.figures: dict = {}
        self.printed = 0.0

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def __call__(self, event: dict) -> None:
        if "steps" not in event:
            return
        self.figures |= event
        text = summary(self.figures)
        last = event["step"] + 1 >= event["steps"]
        if self.console.is_terminal:
            if self.progress is None:
                columns = (TextColumn("{task.description:>13}"), BarColumn(24), TextColumn("{task.fields[text]}"))
                self.progress = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console)
                self.progress.start()
                self.task = self.progress.add_task(NAMES[event["stage"]], total=event["steps"], text="")
            self.progress.update(self.task, completed=event["step"] + 1, text=text)
        elif last or time.time() - self.printed > 10:
            self.printed = time.time()
            left = f"{event['seconds_left']:.0f} s left" if "seconds_left" in event else ""
            print(
                f"{NAMES[event['stage']]} {event['step'] + 1}/{event['steps']}  {text}  {left}",
                file=sys.stderr,
                flush=True,
            )
        if last:
            self.close()

    def close(self) -> None:
        """Leave the bar as it stands; the next stage draws its own."""
        if self.progress:
            self.progress.stop()
        self.progress, self.figures = None, {}


def summary(figures: dict) -> str:
    """The figures of a training event for eyes, whichever it has."""
    shown = (
        ("loss", "loss {:.3f}"),
        ("bpb", "{:.3f} bpb"),
        ("pass_rate", "solved {:.0%}"),
        ("tokens_per_second", "{:,.0f} tok/s"),
    )
    return "  ".join(form.format(figures[key]) for key, form in shown if key in figures)
