"""What every stage shares: starting, resuming or refusing a model folder, and finishing it."""

import platform
import shlex
import shutil
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version

from nanoghost import machine
from nanoghost.errors import UserError
from nanoghost.runs import ModelFolder, Stopping, open_model, writing

NOT_SETTINGS = (
    "name",
    "json",
    "force",
    "parent",
    "checkpoint_seconds",
)  # fields that do not change what the stage computes


class Run:
    """A stage at work on its folder."""

    def __init__(self, folder: ModelFolder, stage: str, card: dict, stopping: Stopping, show):
        self.folder, self.stage, self.card, self.stopping, self.show = folder, stage, card, stopping, show

    def event(self, step: float, **figures) -> None:
        """Append an event to the log and show it."""
        event = {"stage": self.stage, "step": step, **figures}
        if machine.ranks()[0] == 0:
            self.show(self.folder.append_event(event))

    def note(self, **entries) -> None:
        """Write something down in the card, once and for all resumes (planned steps, compile decision)."""
        self.card |= entries
        if machine.ranks()[0] == 0:
            self.folder.write_card(self.card)

    def checkpoint_due(self, clock: "Clock") -> bool:
        """Whether to save now: it is time, or a stop was asked for. All processes decide alike."""
        self.stopping.requested = machine.mean_over_ranks(self.stopping.requested) > 0
        return machine.mean_over_ranks(clock.due()) > 0 or self.stopping.requested

    def stop(self, step: int, steps: int) -> None:
        """Leave after the checkpoint of a requested stop."""
        self.show.close()
        self.show.say(f"{self.folder.name} is saved at step {step} of {steps}")
        raise KeyboardInterrupt

    def finish(self, **figures) -> dict:
        self.note(finished=round(time.time(), 3), figures=figures)
        if machine.ranks()[0] == 0:
            shutil.rmtree(self.folder.path / "state", ignore_errors=True)
        return figures


@contextmanager
def stage_run(stage: str, settings, show, parent: ModelFolder | None = None):
    """Yield a Run for the new model `settings.name`, or None if it is already finished with the same settings.

    An unfinished folder with the same settings is resumed; other settings raise UserError naming --force.
    A child's events begin with its parent's, and its card holds its parent's card.
    """
    folder = ModelFolder(settings.name)
    chosen = {k: v for k, v in asdict(settings).items() if k not in NOT_SETTINGS}
    chosen |= {"parent": parent.name if parent else None}
    first = machine.ranks()[0] == 0
    with writing(folder) if first else nullcontext(), Stopping() as stopping:
        if first:
            prepare_folder(folder, stage, settings, chosen, parent)
        machine.wait_for_ranks()
        card = folder.card
        machine.wait_for_ranks()
        if "finished" in card:
            yield None
            return
        yield Run(folder, stage, card, stopping, show)
        if stopping:  # asked for when the last step was done: what follows must not start
            raise KeyboardInterrupt


def prepare_folder(folder: ModelFolder, stage: str, settings, chosen: dict, parent: ModelFolder | None) -> None:
    """Make the folder with its card and its parent's events, or check that it may be resumed."""
    if folder.exists and settings.force:
        for path in folder.path.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if folder.exists:
        card = folder.card
        changed = [k for k in chosen if card["settings"].get(k) != chosen[k]]
        if card["stage"] != stage or changed:
            what = f"with other settings ({', '.join(changed)})" if changed else f"by stage {card['stage']}"
            raise UserError(f"model '{folder.name}' was made {what}; choose another --name, or --force to replace it")
    else:
        if parent:
            shutil.copy(parent.path / "events.jsonl", folder.path / "events.jsonl")
        folder.write_card(new_card(stage, chosen, parent))


def new_card(stage: str, settings: dict, parent: ModelFolder | None) -> dict:
    return {
        "stage": stage,
        "parent": parent.card if parent else None,
        "settings": settings,
        "seed": settings["seed"],
        "command": shlex.join(["nanoghost", *sys.argv[1:]]),
        "started": round(time.time(), 3),
        "machine": machine.describe(),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("nanoghost", "torch", "tokenizers")},
        },
    }


def parent_of(settings, stage: str) -> ModelFolder:
    """The finished model a stage starts from."""
    parent = open_model(settings.parent)
    if parent.name == settings.name:
        raise UserError(f"{stage} writes a new model: --name must differ from its parent '{parent.name}'")
    return parent


def base_card(card: dict) -> dict:
    """The card of the pretrained model that a model grew from."""
    while card["parent"]:
        card = card["parent"]
    return card


class Clock:
    """Seconds of work over all resumes, and when a checkpoint is due."""

    def __init__(self, seconds_before: float, checkpoint_seconds: float = 0.0):
        self.start = time.perf_counter() - seconds_before
        self.every = checkpoint_seconds
        self.saved = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def due(self) -> bool:
        if time.perf_counter() - self.saved < self.every:
            return False
        self.saved = time.perf_counter()
        return True


class Rate:
    """Tokens per second over the last steps."""

    def __init__(self, over: int = 20):
        self.marks = deque([(time.perf_counter(), 0)], maxlen=over + 1)

    def count(self, tokens: int) -> None:
        self.marks.append((time.perf_counter(), self.marks[-1][1] + tokens))

    @property
    def per_second(self) -> float:
        (t0, n0), (t1, n1) = self.marks[0], self.marks[-1]
        return round((n1 - n0) / (t1 - t0), 1)
