"""What every stage shares: starting, resuming or refusing a model folder, its checkpoints, its clock, and finishing it."""

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Literal

from nanoghost import distributed, hardware
from nanoghost.errors import UserError
from nanoghost.formats.licenses import copy_licences
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.home import ModelFolder, Stopped, Stopping, open_model, writing
from nanoghost.model import lora
from nanoghost.optim.optimizer import Optimizer

# these do not change what a stage computes, or may be changed on the way
NOT_SETTINGS = (
    "name",
    "json",
    "force",
    "parent",
    "checkpoint_seconds",
    "keep_last",
    "keep_every",
    "bad_loss",
    "hang_minutes",
)
POSITIVE = (
    "minutes",
    "steps",
    "dial_minutes",
    "depth",
    "vocab_size",
    "context",
    "batch",
    "micro_batch",
    "problems",
    "max_tokens",
)
INHERITED = ("data", "arch", "config", "parameters", "vocab_size")  # what a child's card takes from its parent's


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What every stage is asked."""

    minutes: float | None = None
    """How long to train; becomes a number of steps before the first one. Default: 4 for pretraining, 2.5 for what comes later."""
    steps: int | None = None
    """How many steps to train, instead of minutes."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints."""
    keep_last: int = 2
    """How many checkpoints stay while training, beside the one with the lowest loss."""
    keep_every: int = 0
    """Keep the checkpoints of every so many-th step, also when training is finished; 0: none."""
    bad_loss: Literal["stop", "skip", "roll-back"] = "stop"
    """When the loss is no number: stop, skip the batch, or roll back to the last checkpoint and go on with later batches."""
    hang_minutes: float = 10.0
    """Longest step of several processes; after that each writes down where it stands and ends, for torchrun to start anew."""
    force: bool = False
    """Replace a model of that name."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass(frozen=True, kw_only=True)
class LaterSettings(StageSettings):
    """What stages are asked that start from a model."""

    lora: int | None = None
    """Train only an adapter of this rank, which is named BASE@NAME; 8 to 32 are usual. Default: train everything."""
    lora_alpha: float | None = None
    """Strength of the adapter, in PEFT's words; default: 32."""
    lora_targets: str | None = None
    """Which matrices it corrects, of q,k,v,out,gate,up,down; default: all."""


class Run:
    """A stage at work on its folder."""

    def __init__(self, folder: ModelFolder, stage: str, card: dict, stopping: Stopping, show, settings):
        self.folder, self.stage, self.card, self.stopping, self.show = folder, stage, card, stopping, show
        self.settings, self.keeper = settings, None
        self.next = 0  # the step that comes next

    def event(self, step: float, **figures) -> None:
        """Append an event to the log and show it."""
        event = {"stage": self.stage, "step": step, **figures}
        if distributed.ranks()[0] == 0:
            self.show(self.folder.append_event(event))

    def note(self, **entries) -> None:
        """Write something down in the card, once and for all resumes (planned steps, compile decision)."""
        self.card |= entries
        if distributed.ranks()[0] == 0:
            self.folder.write_card(self.card)

    def resume(self, optimizer) -> tuple[int, dict]:
        """(the step to go on at, what was noted there), with the optimizer as it was then; (0, {}) at a fresh start."""
        from nanoghost.train.fault_tolerance import Keeper

        self.keeper = Keeper(self, optimizer)
        self.next, notes = self.keeper.checkpoints.load(optimizer)
        return self.next, notes

    def steps(self):
        """The steps that are left; after a rollback some come again."""
        while self.next < self.card["steps"]:
            self.next += 1
            yield self.next - 1
        self.keeper.end()

    def batch(self, step: int) -> int:
        """Which batch a step learns: that of its number, or a later one where some were left out (`roll-back`)."""
        return step + sum(count for first, count in self.card.get("left_out_batches", ()) if step >= first)

    def ready(self, step: int, loss: float, rows, clock: "Clock", score: float | None = None, **notes) -> float | None:
        """To be called between gradients and update: the mean loss over the processes, or None if there must be no update.

        Saves what is needed to go on at `step` if it is time, and leaves if a stop was asked for; all processes decide
        alike. `rows`: what this process learns in the step, `score`: how good it is, if not the loss says it (less is better).
        """
        return self.keeper.ready(step, loss, rows, clock, loss if score is None else score, notes)

    def finish(self, **figures) -> dict:
        self.note(finished=round(time.time(), 3), figures=figures)
        if distributed.ranks()[0] == 0 and not self.settings.keep_every:
            shutil.rmtree(self.folder.path / "state", ignore_errors=True)
        return figures


@contextmanager
def run(stage: str, settings, show, parent: ModelFolder | None = None):
    """Yield a Run for the new model `settings.name`, or None if it is already finished with the same settings.

    An unfinished folder with the same settings is resumed; other settings raise UserError naming --force.
    A child's events begin with its parent's, and its card holds its parent's card.
    """
    folder = ModelFolder(settings.name)
    if "@" in folder.name and not (parent and parent.base == folder.base and ("@" in parent.name or settings.lora)):
        raise UserError(f"only adapters have names like '{folder.name}': BASE@NAME, made from BASE with --lora")
    chosen = {k: v for k, v in asdict(settings).items() if k not in NOT_SETTINGS}
    chosen |= {"parent": parent.name if parent else None}
    first = distributed.ranks()[0] == 0
    with writing(folder) if first else nullcontext(), Stopping() as stopping:
        if first:
            prepare_folder(folder, stage, settings, chosen, parent)
        distributed.barrier()
        card = folder.card
        distributed.barrier()
        if "finished" in card:
            yield None
            return
        yield Run(folder, stage, card, stopping, show, settings)
        distributed.barrier()  # the next stage reads what the first of them has written
        if stopping:  # asked for when the last step was done: what follows must not start
            raise Stopped


def prepare_folder(folder: ModelFolder, stage: str, settings, chosen: dict, parent: ModelFolder | None) -> None:
    """Make the folder with its card and its parent's events, or check that it may be resumed."""
    if folder.exists and settings.force and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
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
            if base_card(parent.card)["stage"] == "adopt":
                copy_licences(parent.path, folder.path)
        folder.write_card(new_card(stage, chosen, parent))


def new_card(stage: str, settings: dict, parent: ModelFolder | None) -> dict:
    return {
        "stage": stage,
        "parent": parent.card if parent else None,
        **({key: parent.card[key] for key in INHERITED} if parent else {}),
        "settings": settings,
        "seed": settings["seed"],
        "command": shlex.join(["nanoghost", *sys.argv[1:]]),
        "started": round(time.time(), 3),
        "machine": hardware.describe(),
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("nanoghost", "torch", "tokenizers")},
    }


def parent_of(settings, stage: str) -> ModelFolder:
    """The finished model a stage starts from."""
    parent = open_model(settings.parent)
    if settings.name in (parent.name, parent.name.partition("@")[2]):
        raise UserError(f"{stage} writes a new model: --name must differ from its parent '{parent.name}'")
    return parent


def named(settings, parent: ModelFolder):
    """The settings with the new model's whole name: what gets an adapter, or goes on with one, is BASE@NAME."""
    if settings.lora is None and "@" not in parent.name:
        return settings

    return replace(settings, name=whole_name(settings, parent))


def load_parent(parent: ModelFolder, settings):
    """(model, tokenizer) to train: the parent's, with a new adapter on it if one is asked for."""
    model, tokenizer = load_model(parent.path, hardware.compute_dtype(), hardware.device())
    if settings.lora is not None:
        lora.attach(
            model, [lora.new_adapter(model, settings.lora, settings.lora_alpha, settings.lora_targets, settings.seed)]
        )
    return model, tokenizer


def with_optimizer(model, rates, settings):
    """(the model, its optimizer)."""
    if getattr(settings, "shard", None):
        from nanoghost.optim.fsdp import shard

        return shard(model, rates)
    return model, Optimizer(model, rates, hardware.compute_dtype(), *distributed.ranks())


def save(run: Run, model, tokenizer) -> None:
    """Write what was learned; where processes share a model out they put it together first."""
    model = model.whole() if hasattr(model, "whole") else model
    if distributed.ranks()[0] == 0:
        save_model(run.folder.path, model, tokenizer)


def check_numbers(settings) -> None:
    """To be called before any work is done."""
    if settings.minutes and settings.steps:
        raise UserError("--minutes and --steps exclude each other")
    for name in POSITIVE:
        if (value := getattr(settings, name, None)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")


def steps_within(seconds: float, one_step, rehearsals: int = 12) -> int:
    """How many steps fit into the time, going by a rehearsal of `one_step(i)` on a throwaway copy of the model.

    The first third is not counted (allocation, compiling), and the second fastest of the others counts: what disturbs a
    moment of the rehearsal must not shorten the run. All processes get the same number.
    """
    times = []
    for i in range(rehearsals):
        start = time.perf_counter()
        one_step(i)
        times.append(time.perf_counter() - start)
    left = seconds - sum(times)
    return max(1, round(distributed.all_reduce_mean(left / (sorted(times[rehearsals // 3 :])[1] * 1.05))))


def print_figures(figures: dict | None, settings) -> None:
    """What --json prints, once."""
    if figures and settings.json and distributed.ranks()[0] == 0:
        print(json.dumps(figures))


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
        return round((n1 - n0) / max(t1 - t0, 1e-9), 1)


def whole_name(settings, parent: ModelFolder) -> str:
    """BASE@NAME, of a new adapter on `parent` or of one that goes on with the parent's."""
    if settings.lora is not None:
        if parent.card["arch"] == "ghost":
            raise UserError(f"--lora is for models of the Llama family, and '{parent.name}' is a ghost")
        if "@" in parent.name:
            raise UserError(f"'{parent.name}' has an adapter already, which goes on as it is: leave out --lora")
        check_lora(settings.lora, settings.lora_targets)
    return f"{parent.base}@{settings.name.removeprefix(f'{parent.base}@')}"


def check_lora(rank: int, targets: str | None) -> None:
    """Whether such an adapter can be made; to be called before any work is done."""
    if rank < 1:
        raise UserError(f"--lora is the rank of the adapter, at least 1, not {rank}")
    if unknown := set((targets or "q").split(",")) - set(lora.MODULES):
        raise UserError(f"--lora-targets knows {', '.join(lora.MODULES)}, not '{', '.join(sorted(unknown))}'")
