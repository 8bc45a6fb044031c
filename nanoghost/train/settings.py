"""Command-line settings that the training stages share, and their checks."""

from dataclasses import dataclass, replace
from typing import Literal

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder
from nanoghost.model.registry import LLAMA_FAMILY
from nanoghost.model.tensor_names import MATRIX_MODULES
from nanoghost.progress import JsonFlag

DEFAULT_FINETUNE_MINUTES = 2.5

# Settings that may differ when a run is resumed: they do not affect its result. `name` is the name of the folder, and
# the name of the parent is compared after `parent` is resolved (run.prepare_folder).
CHANGEABLE_ON_RESUME = (
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
MUST_BE_POSITIVE = (
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


@dataclass(frozen=True, kw_only=True)
class StageSettings(JsonFlag):
    """Settings of every stage."""

    minutes: float | None = None
    """Training time in minutes, converted to steps before the first one. Default: 4 for pretrain, else 2.5."""
    steps: int | None = None
    """Number of training steps, instead of minutes."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    keep_last: int = 2
    """Number of recent checkpoints to keep during training, in addition to the best one."""
    keep_every: int = 0
    """Keep a permanent checkpoint every N steps (0 = never)."""
    bad_loss: Literal["stop", "skip", "roll-back"] = "stop"
    """If the loss is NaN or inf: stop, skip the batch, or roll back to the last checkpoint and use later batches."""
    hang_minutes: float = 10.0
    """With several processes: if a step takes longer, dump the stacks and exit, so that torchrun restarts the job."""
    force: bool = False
    """Replace an existing model of the same name."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(StageSettings):
    """Settings of the stages that start from a model."""

    lora: int | None = None
    """Train only a LoRA adapter of this rank, named BASE@NAME; 8 to 32 are usual. Default: train all weights."""
    lora_alpha: float | None = None
    """LoRA alpha. Default: 32."""
    lora_targets: str | None = None
    """Matrices that the adapter applies to, comma-separated, from q,k,v,out,gate,up,down. Default: all."""


def check_settings(settings: StageSettings) -> None:
    """Raise UserError for numbers that cannot work. Stages call it before any expensive work."""
    if settings.minutes and settings.steps:
        raise UserError("--minutes and --steps exclude each other")
    for name in MUST_BE_POSITIVE:
        value = getattr(settings, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")


def check_batch_is_divisible(settings, world_size: int) -> None:
    if settings.batch % world_size:
        raise UserError(f"--batch {settings.batch} is not divisible by the number of processes, {world_size}")


def sampling_seed(seed: int, batch: int) -> int:
    """Seed of the sampler for one batch. Two seeds share none in the first million batches."""
    return seed * 1_000_003 + batch


def with_adapter_name(settings, parent: ModelFolder):
    """The settings with the full name of the new model: BASE@NAME if it is an adapter, new or trained further."""
    for flag in ("lora_alpha", "lora_targets"):
        if settings.lora is None and getattr(settings, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} needs --lora")
    if settings.lora is None and "@" not in parent.name:
        return settings
    if settings.lora is not None:
        check_lora(settings, parent)
    adapter_name = settings.name.removeprefix(f"{parent.base}@")
    return replace(settings, name=f"{parent.base}@{adapter_name}")


def check_lora(settings, parent: ModelFolder) -> None:
    """Raise UserError if the parent cannot get the adapter that the settings describe."""
    if parent.card.arch not in LLAMA_FAMILY:
        raise UserError(f"--lora supports models of the Llama family, and '{parent.name}' is a {parent.card.arch}")
    if "@" in parent.name:
        raise UserError(f"'{parent.name}' already is an adapter, which is trained further: leave out --lora")
    if settings.lora < 1:
        raise UserError(f"--lora is the rank of the adapter and must be at least 1, not {settings.lora}")
    targets = settings.lora_targets.split(",") if settings.lora_targets else []
    unknown = sorted(set(targets) - set(MATRIX_MODULES))
    if unknown:
        raise UserError(f"--lora-targets: unknown '{', '.join(unknown)}'; choose from {', '.join(MATRIX_MODULES)}")
