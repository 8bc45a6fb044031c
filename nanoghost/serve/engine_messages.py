"""The messages between the server and the engine process, and the values in them.

Server to engine: EngineRequest, Cancel, LoadModel. Engine to server: lists of TokenDelta, RequestFailed, ModelStatus.
"""

from dataclasses import dataclass, field

from nanoghost.engine.logits_processors import TopLogprobs
from nanoghost.engine.sampler import SamplingParams

PROMPT_SAMPLE = -1
"""The sample number of deltas with the log-probabilities of the prompt itself."""


@dataclass(frozen=True)
class Capacity:
    """Limits of the engine process."""

    slots: int = 64
    """Sequences that run at the same time."""
    context: int = 2048
    """Maximum number of tokens of a sequence."""
    base_models: int = 2
    """Base models that stay loaded; the least recently used is unloaded first."""


@dataclass(frozen=True)
class ModelRef:
    """A base model and the adapter to run it with."""

    base: str
    finished: float
    """When the base was finished, in seconds since 1970: a model trained again under the same name is another model."""
    adapter: str = ""
    """Folder of the adapter; empty for the base alone."""
    adapter_mtime_ns: int = 0
    """When the adapter was written, in nanoseconds since 1970: `nanoghost sleep` replaces the adapter of a person."""

    @property
    def adapter_name(self) -> str:
        """Name of the adapter in the engine; empty for the base alone."""
        return f"{self.adapter} {self.adapter_mtime_ns}" if self.adapter else ""


@dataclass(frozen=True)
class EngineRequest:
    """A prompt to be continued, to be scored, or both."""

    request_id: int
    model: ModelRef
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    owner: str = ""
    """Prefixes in the KV cache are shared only among requests of one owner."""
    grammar: str = ""
    """Only texts of this grammar may be generated (llguidance)."""
    top_logprobs: int | None = None
    """Report log-probabilities, and those of this many of the likeliest tokens; None: report none."""
    prompt_logprobs: bool = False
    """First report the log-probabilities of the prompt's own tokens, from the second on."""

    @property
    def num_sequences(self) -> int:
        return self.num_samples if self.sampling.max_tokens else 0


@dataclass(frozen=True)
class Cancel:
    request_id: int
    sample: int | None = None
    """None: all samples."""


@dataclass(frozen=True)
class LoadModel:
    """Load a model before the first request for it."""

    model: ModelRef


@dataclass(frozen=True)
class TokenDelta:
    """The new tokens of one sample."""

    request_id: int
    sample: int
    token_ids: list[int]
    logprobs: list[TopLogprobs]
    """One for each token, if the request asks for them."""
    finish_reason: str
    """stop or length; "complete" for the prompt's log-probabilities; empty while more tokens follow."""


@dataclass(frozen=True)
class RequestFailed:
    request_id: int | None
    """None: a LoadModel failed."""
    message: str


@dataclass(frozen=True)
class ModelStatus:
    """A base model is being loaded, or is ready."""

    base: str
    loading: bool
