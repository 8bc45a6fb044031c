"""The model card: how a model was made. `card.json` in every model folder; it contains the cards of all ancestors."""

from dataclasses import dataclass, field, fields
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from nanoghost.errors import UserError

CARD_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    name: str
    """Name of the model folder."""
    stage: str
    """Stage that made the model: pretrain, sft, rl, distill or adopt."""
    parent: "ModelCard | None" = None
    """Card of the model that the stage started from; None for pretrained and adopted models."""
    settings: dict = field(default_factory=dict)
    """Settings of the stage that affect the result. A run is only resumed with the same settings."""
    inputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the stage learns from: data, tokenizer, parent, teacher. A run is only resumed with the same."""
    seed: int = 0
    """Random seed of the stage."""
    command: str = ""
    """Command line that started the stage."""
    started: float = 0.0
    """Unix time of the start."""
    finished: float | None = None
    """Unix time of the end; None while the stage is unfinished."""
    machine: dict = field(default_factory=dict)
    """The machine of the run, as `hardware.describe()` returns it."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python, nanoghost, torch and tokenizers."""
    data: list[dict] = field(default_factory=list)
    """Text sources that the model and its ancestors learned from: name, fingerprint, license, attribution."""
    arch: str = ""
    """Architecture: ghost, or one of the Llama family."""
    config: dict = field(default_factory=dict)
    """Hyperparameters of the architecture, as in `config.json`."""
    vocab_size: int = 0
    """Number of tokens of the tokenizer."""
    parameters: int = 0
    """Number of parameters, without those of an adapter."""
    parameter_counts: dict[str, int] = field(default_factory=dict)
    """Number of parameters by kind (matrices, head, embeddings ...)."""
    depth: int | None = None
    """Number of layers that the dial chose (pretrain)."""
    depth_reason: str | None = None
    """Why this depth was chosen (pretrain)."""
    compile: dict | None = None
    """Whether the model was compiled ("on"), and why ("reason") (pretrain)."""
    steps: int | None = None
    """Number of optimizer steps, fixed before step 0, so that a resumed run ends at the same step; None before that."""
    skipped_batches: list[list[int]] = field(default_factory=list)
    """[step, count] for each rollback: from this step on, the run uses batches that come `count` later."""
    conversations: int | None = None
    """Number of training conversations (sft)."""
    dropped_conversations: int | None = None
    """Number of conversations without an answer that fits into the context (sft)."""
    adapters: list[dict] = field(default_factory=list)
    """LoRA adapters on the model: rank, alpha, targets, parameters."""
    teacher: "ModelCard | None" = None
    """Card of the teacher (distill)."""
    teacher_seconds: float | None = None
    """Time that the teacher needed to produce its targets (distill)."""
    accuracy_before: dict | None = None
    """Accuracy on held-out problems of each task before the first step (rl)."""
    figures: dict = field(default_factory=dict)
    """Results of the finished stage: tokens, seconds, loss, bits per byte ..."""

    @property
    def root(self) -> "ModelCard":
        """Card of the first ancestor: the model that was pretrained here, or adopted."""
        return self.lineage()[0]

    def lineage(self) -> list["ModelCard"]:
        """Cards of all ancestors, the oldest first, and this one."""
        return [*(self.parent.lineage() if self.parent else ()), self]

    def to_json(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for key in ("parent", "teacher"):
            if values[key]:
                values[key] = values[key].to_json()
        return {"format": CARD_FORMAT} | {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: dict) -> "ModelCard":
        """Raises UserError if the card is damaged or has another format: older model folders are not migrated."""
        values = dict(values)
        version = values.pop("format", None)
        if version != CARD_FORMAT:
            raise UserError(
                f"model '{values.get('name')}' has format {version}, but this nanoghost reads format {CARD_FORMAT}:"
                " train the model again, or remove its folder"
            )
        for key in ("parent", "teacher"):
            if isinstance(values.get(key), dict):
                values[key] = cls.from_json(values[key])
        types = get_type_hints(cls)
        invalid = [key for key in values if key not in types or not has_type(values[key], types[key])]
        invalid += [key for key in ("name", "stage") if key not in values]
        if invalid:
            raise UserError(f"the card of model {values.get('name')!r:.80} is damaged: {invalid[0]!r:.40} is not valid")
        return cls(**values)


def has_type(value, annotation) -> bool:
    """Whether a value of JSON is of the annotated type, without a look at the items of a list or an object."""
    alternatives = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    types = tuple(get_origin(alternative) or alternative for alternative in alternatives)
    return isinstance(value, (*types, int) if float in types else types)
