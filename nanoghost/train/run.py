"""A run: one stage that writes one model folder. Creating or resuming the folder, its card and its events, saving the
model."""

import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from nanoghost import distributed, hardware
from nanoghost.errors import StopFlag, Stopped, UserError
from nanoghost.evals.report import print_report
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.home import ModelFolder, home, open_model, write_lock
from nanoghost.model import lora
from nanoghost.optim.fsdp import full_model, shard_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.train.clock import Clock, Throughput
from nanoghost.train.settings import (
    CHANGEABLE_ON_RESUME,
    FinetuneSettings,
    StageSettings,
    check_settings,
    with_adapter_name,
)

LOGGED_STEPS = 500  # number of steps that a run logs, evenly spaced


class Run:
    """A stage that trains one model, and the folder of that model. Only rank 0 writes."""

    def __init__(self, folder: ModelFolder, stage: str, stop_flag: StopFlag, display, settings: StageSettings):
        self.folder, self.stage, self.stop_flag, self.display, self.settings = (
            folder,
            stage,
            stop_flag,
            display,
            settings,
        )
        self.card = folder.card
        self.is_main_process = distributed.is_main_process()

    def log_event(self, step: float, **figures) -> None:
        """Append an event to events.jsonl and show it."""
        if self.is_main_process:
            self.display.show(self.folder.append_event({"stage": self.stage, "step": step, **figures}))

    def log_step(self, step: int, clock: Clock, throughput: Throughput, **figures) -> None:
        """Log the event of a training step, if it is one of about 500 steps to be logged."""
        steps = self.card.steps
        if step % max(1, steps // LOGGED_STEPS) == 0 or step == steps - 1:
            self.log_event(
                step,
                steps=steps,
                **figures,
                tokens_per_second=throughput.tokens_per_second,
                seconds=clock.seconds,
                seconds_left=clock.seconds_left(steps - step - 1),
            )

    def update_card(self, **values) -> None:
        """Set fields of the card. They are saved at once and stay the same when the run is resumed."""
        self.card = replace(self.card, **values)
        if self.is_main_process:
            self.folder.write_card(self.card)
            if self.card.steps is not None:  # from here on the new model replaces the old one
                shutil.rmtree(backup_path(self.folder), ignore_errors=True)

    def save_model(self, model, tokenizer) -> None:
        """Write the model. If its weights are sharded over the processes (FSDP), they are gathered first."""
        model = full_model(model)
        if self.is_main_process:
            save_model(self.folder.path, model, tokenizer)

    def finish(self, tokens: int, seconds: float, throughput: Throughput, flops_per_token: int, **results) -> dict:
        """Mark the model as finished and return its figures. Removes the checkpoints, unless --keep-every is set."""
        figures = {
            "name": self.folder.name,
            "parameters": self.card.parameters,
            "steps": self.card.steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": throughput.tokens_per_second,
            "flops_per_second": throughput.tokens_per_second * flops_per_token,
        } | results
        self.update_card(finished=round(time.time(), 3), figures=figures)
        if self.is_main_process and not self.settings.keep_every:
            shutil.rmtree(self.folder.path / "state", ignore_errors=True)
        return figures


@contextmanager
def start_run(stage: str, settings: StageSettings, display, inputs: dict[str, str], parent: ModelFolder | None = None):
    """Yield a Run for the new model `settings.name`, or None if it is already finished with the same settings.

    `inputs`: fingerprints of what the stage learns from (the parent's is added here). An unfinished folder with the
    same settings and inputs is resumed; others raise UserError. After a UserError before the number of steps is known
    (no conversation can be learned, for example), everything is as it was before the command; the same holds for Ctrl-C
    where the command was to replace a model.
    """
    folder = ModelFolder(settings.name)
    if "@" in folder.name and not (parent and parent.base == folder.base and ("@" in parent.name or settings.lora)):
        raise UserError(f"only adapters have names like '{folder.name}': BASE@NAME, made from BASE with --lora")
    is_main_process = distributed.is_main_process()
    with write_lock(folder) if is_main_process else nullcontext(), StopFlag() as stop_flag:
        if is_main_process:
            prepare_folder(folder, stage, settings, inputs, parent)
        distributed.barrier()
        run = Run(folder, stage, stop_flag, display, settings)
        distributed.barrier()
        if run.card.finished:
            display.print(f"{folder.name} is finished; --force trains it again")
            yield None
            return
        try:
            yield run
        except (UserError, KeyboardInterrupt) as error:
            nothing_learned = run.card.steps is None and not restarts_are_possible()
            can_resume = isinstance(error, KeyboardInterrupt) and not backup_path(folder).exists()
            if is_main_process and nothing_learned and not can_resume:
                undo(folder)
            raise
        # The next stage reads what the main process has written, and must not start if a stop was requested at the end.
        if distributed.all_reduce_mean(stop_flag.requested) > 0:
            raise Stopped


def prepare_folder(
    folder: ModelFolder, stage: str, settings: StageSettings, inputs: dict[str, str], parent: ModelFolder | None
) -> None:
    """Create the folder with its card and the parent's events, or check that an existing folder can be resumed."""
    if parent:
        inputs = inputs | {"parent": parent.fingerprint}
    check_same_run(stage, settings, inputs, parent)
    if folder.exists and settings.force and not restarted_by_torchrun():
        set_aside(folder)
    if folder.exists:
        return
    if parent:
        shutil.copy(parent.path / "events.jsonl", folder.path / "events.jsonl")
        if parent.card.root.stage == "adopt":
            copy_license_files(parent.path, folder.path)
    card = new_card(folder.name, stage, relevant_settings(settings, parent), parent.card if parent else None)
    folder.write_card(replace(card, inputs=inputs))


def restarts_are_possible() -> bool:
    """Whether torchrun started this process. A restarted process must find the folder of the process before."""
    return "TORCHELASTIC_RESTART_COUNT" in os.environ


def restarted_by_torchrun() -> bool:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def relevant_settings(settings: StageSettings, parent: ModelFolder | None) -> dict:
    """The settings that affect the result."""
    relevant = {key: value for key, value in asdict(settings).items() if key not in CHANGEABLE_ON_RESUME}
    return relevant | {"parent": parent.name if parent else None}


def check_same_run(
    stage: str, settings: StageSettings, inputs: dict[str, str], parent: ModelFolder | None = None
) -> None:
    """Raise UserError if the model exists and was made by another stage, with other settings or from other inputs.

    `start_run` calls it. Stages that prepare their inputs for long also call it before, with the inputs that they know.
    """
    folder = ModelFolder(settings.name)
    if not folder.exists or (settings.force and not restarted_by_torchrun()):
        return
    card, current = folder.card, relevant_settings(settings, parent)
    remedy = "choose another --name, or --force to replace it"
    changed = [key for key in current if card.settings.get(key) != current[key]]
    if card.stage != stage or changed:
        difference = f"with other settings ({', '.join(changed)})" if changed else f"by stage {card.stage}"
        raise UserError(f"model '{folder.name}' exists and was made {difference}; {remedy}")
    changed_inputs = []
    for key, fingerprint in inputs.items():
        if card.inputs.get(key, fingerprint) != fingerprint:
            value = current.get(key)
            changed_inputs.append(f"{key} '{value}'" if value else key)
    if changed_inputs:
        state = "is finished" if card.finished else "is unfinished"
        raise UserError(
            f"model '{folder.name}' {state}, and its {' and its '.join(changed_inputs)} has changed since it was"
            f" started: put the old content back, {remedy}"
        )


def backup_path(folder: ModelFolder) -> Path:
    return home() / "replaced" / folder.name


def set_aside(folder: ModelFolder) -> None:
    """Move the files of the model that --force replaces to the backup folder.

    If that exists, an earlier command was killed before its model had learned anything: the older model is kept.
    """
    backup = backup_path(folder)
    if backup.exists():
        clear(folder)
    else:
        backup.mkdir(parents=True)
        move_files(folder.path, backup)


def undo(folder: ModelFolder) -> None:
    """Remove the new model, and bring back the one that it was to replace."""
    clear(folder)
    backup = backup_path(folder)
    if backup.exists():
        move_files(backup, folder.path)
        backup.rmdir()
    else:
        shutil.rmtree(folder.path)


def clear(folder: ModelFolder) -> None:
    """Remove everything but the lock, which this process holds."""
    for path in folder.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def move_files(source: Path, target: Path) -> None:
    """Move everything but the lock, which this process holds."""
    for path in source.iterdir():
        if path.name != ".lock":
            path.rename(target / path.name)


def new_card(name: str, stage: str, settings: dict, parent: ModelCard | None) -> ModelCard:
    """The card of a model whose stage starts now; it inherits the parent's architecture and data sources."""
    card = ModelCard(
        name=name,
        stage=stage,
        parent=parent,
        settings=settings,
        seed=settings["seed"],
        command=shlex.join(["nanoghost", *sys.argv[1:]]),
        started=round(time.time(), 3),
        machine=hardware.describe(),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in ("nanoghost", "torch", "tokenizers")},
    )
    if parent is None:
        return card
    return replace(
        card,
        data=parent.data,
        arch=parent.arch,
        config=parent.config,
        parameters=parent.parameters,
        vocab_size=parent.vocab_size,
    )


# -- for stages that start from a model -------------------------------------------------------------------------------


def prepare_finetuning(stage: str, settings: FinetuneSettings) -> tuple[FinetuneSettings, ModelFolder]:
    """What sft, rl and distill do first: set up the process, check the settings, open the parent.

    Returns (settings with the full name of the new model, the parent).
    """
    hardware.prepare()
    distributed.init_distributed()
    check_settings(settings)
    parent = open_parent(settings)
    if settings.name in (parent.name, parent.name.partition("@")[2]):
        raise UserError(f"{stage} writes a new model: --name must differ from its parent '{parent.name}'")
    return with_adapter_name(settings, parent), parent


def open_parent(settings: FinetuneSettings) -> ModelFolder:
    """The parent that the settings name. By default that of the existing model, otherwise the model finished last."""
    folder = ModelFolder(settings.name)
    if settings.parent is None and folder.exists and not settings.force:
        return open_model(folder.card.settings.get("parent"))
    return open_model(settings.parent)


def load_parent(parent: ModelFolder, settings: FinetuneSettings):
    """(model, tokenizer) of the parent, with a new LoRA adapter if --lora asks for one."""
    model, tokenizer = load_model(parent.path, hardware.compute_dtype(), hardware.device())
    if settings.lora is not None:
        adapter = lora.new_adapter(model, settings.lora, settings.lora_alpha, settings.lora_targets, settings.seed)
        lora.attach_adapters(model, [adapter])
    return model, tokenizer


def fingerprint_of_conversations(conversations: list[list[dict]]) -> str:
    """SHA-256 (hex) of their content."""
    digest = hashlib.sha256()
    for messages in conversations:
        digest.update(json.dumps(messages).encode())
    return digest.hexdigest()


def build_optimizer(model, groups, settings: StageSettings):
    """(model, optimizer); `--shard model` wraps the model in FSDP."""
    if getattr(settings, "shard", None):
        return shard_model(model, groups)
    return model, Optimizer(model, groups, hardware.compute_dtype(), *distributed.rank_and_world_size())


def print_results(figures: dict | None, settings: StageSettings) -> None:
    """Print the figures of a stage if --json asks for them. None: the model was finished before, so show its report."""
    if not distributed.is_main_process():
        return
    if figures is None:
        if isinstance(settings, FinetuneSettings):
            settings = with_adapter_name(settings, open_parent(settings))
        folder = ModelFolder(settings.name)
        print_report(folder)
        figures = folder.card.figures
    if settings.json:
        print(json.dumps(figures))
