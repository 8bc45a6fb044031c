"""A sequence: one prompt and the completion that the engine writes for it, as in vLLM.

Several samples of one prompt are several sequences: the first computes the prompt, and its siblings are forked from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from nanoghost.engine.logits_processors import LogitsProcessor
from nanoghost.engine.prompt_lookup import PromptLookup
from nanoghost.engine.sampler import SamplingParams


@dataclass(eq=False)
class Sequence:
    prompt_ids: list[int]
    sampling: SamplingParams
    max_len: int
    """Maximum number of tokens in the KV cache, including the prompt."""
    rng_stream: int = 0
    """Which of the seed's streams of random numbers this sequence draws from."""
    run_tool: Callable[[dict], str] | None = None
    """Maps an OpenAI tool call to its result. None: a tool call ends the completion."""
    adapter: str = ""
    """Name of the LoRA adapter; empty for the base model."""
    owner: str = ""
    """Prefixes are shared only among sequences of one owner."""
    logits_processor: LogitsProcessor | None = None
    """For sequences with a grammar or with recorded log-probabilities."""
    completion_ids: list[int] = field(default_factory=list)
    """Everything after the prompt: sampled tokens and tool results."""
    logprobs: list[float] = field(default_factory=list)
    """log P of each completion token under the distribution it was sampled from; 0 for tool results."""
    sampled_mask: list[bool] = field(default_factory=list)
    """True for completion tokens that the model sampled, False for tool results."""
    messages: list[dict] = field(default_factory=list)
    """Complete messages: assistant, tool, assistant ..."""
    message_start: int = 0
    """Index in `completion_ids` where the current message begins."""
    num_computed: int = 0
    """Number of tokens whose keys and values are in the cache."""
    pending_ids: list[int] = field(default_factory=list)
    """The tokens after those, which are still to be computed."""
    siblings: list["Sequence"] = field(default_factory=list)
    """Other samples of the same prompt, to be forked once the prompt is computed."""
    finish_reason: str = ""
    """stop, length or cancelled; empty while the sequence runs."""
    prompt_lookup: PromptLookup = field(default_factory=PromptLookup)
    """Proposes drafts for speculative decoding."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.completion_ids

    def append(self, token_ids: list[int], logprobs: list[float], sampled: bool) -> None:
        self.completion_ids += token_ids
        self.logprobs += logprobs
        self.sampled_mask += [sampled] * len(token_ids)
        self.pending_ids += token_ids


@dataclass
class ScheduledChunk:
    """The tokens of one sequence that one step computes."""

    sequence: Sequence
    token_ids: list[int]
    num_logits: int
    """Logits are needed after this many tokens at the end of the chunk: none while a prompt is incomplete, otherwise
    one, and one more for each draft token."""
    num_draft: int = 0
    """The last tokens of the chunk are a draft: proposed, not sampled yet."""

    @property
    def is_decode(self) -> bool:
        """Whether it is one token with logits. (A part of a prompt can be one token, too, but without logits.)"""
        return len(self.token_ids) == 1 and self.num_logits == 1
