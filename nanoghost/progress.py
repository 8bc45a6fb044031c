"""Output of commands: a progress bar for each stage, drawn from the events of events.jsonl, and the flag --json."""

import atexit
import os
import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

TITLES = {  # stage: its title; other stages are shown under their own names
    "pretrain": "pretraining",
    "sft": "finetuning",
    "rl": "RL",
    "distill": "distillation",
    "synthesize": "synthesis",
    "lecun1989": "digits",
}
FIGURES = (  # (key of an event, format of its value)
    ("loss", "loss {:.3f}"),
    ("bpb", "{:.3f} bpb"),
    ("reward", "reward {:.2f}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True, kw_only=True)
class JsonFlag:
    """Settings of a command that can print its results as JSON. Everything else goes to standard error."""

    json: bool = False
    """Print the results as JSON on standard output."""


class Display:
    """Shows the progress of a stage: on a terminal as a bar, otherwise as a line every ten seconds."""

    def __init__(self):
        is_main_process = os.environ.get("RANK", "0") == "0"
        self.console = Console(stderr=True, quiet=not is_main_process)
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.figures: dict = {}  # the latest value of each key
        self.last_line = 0.0

    def print(self, text: str) -> None:
        """Print a line to standard error, above the progress bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, event: dict) -> None:
        """Show an event of events.jsonl. Only events of training steps are shown: those with the key "steps"."""
        if "steps" not in event:
            return
        self.figures |= event
        title = TITLES.get(event["stage"], event["stage"])
        done, total = event["step"] + 1, event["steps"]
        if self.console.is_terminal:
            if self.progress is None:
                self.start_bar(title, total)
            self.progress.update(self.task, completed=done, text=summary(self.figures))
        elif done >= total or time.time() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.time()
            remaining = f"  {event['seconds_left']:.0f} s left" if "seconds_left" in event else ""
            print(f"{title} {done}/{total}  {summary(self.figures)}{remaining}", file=sys.stderr, flush=True)
        if done >= total:
            self.close()

    def start_bar(self, title: str, total: int) -> None:
        columns = (TextColumn("{task.description:>13}"), BarColumn(24), TextColumn("{task.fields[text]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console)
        self.progress.start()
        atexit.register(self.close)  # after an error or a signal, this shows the cursor again
        self.task = self.progress.add_task(title, total=total, text="")

    def close(self) -> None:
        """Leave the bar as it is; the next stage draws a new one."""
        if self.progress:
            self.progress.stop()
        self.progress, self.figures = None, {}


def summary(figures: dict) -> str:
    """The figures of a training event as a short text."""
    return "  ".join(template.format(figures[key]) for key, template in FIGURES if key in figures)
