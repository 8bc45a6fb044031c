"""Generation: prompts in, tokens out, one step for all rows at a time, with a KV cache and tools.

When a row ends a message that calls a tool, the tool runs, its answer is fed to the row token by token, and the row
goes on: the conversation never leaves the cache.

B rows, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from nanoghost.chat import following, parse_reply
from nanoghost.errors import UserError

TOOL_ROUNDS = 4  # calls a model may make in one answer


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 128
    """Most tokens a row may write; what a tool answers does not count."""
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    seed: int = 0
    """Same seed, same batch: same tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are cut off."""


@dataclass
class Row:
    """One conversation being continued."""

    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    """What came after the prompt."""
    logprobs: list[float] = field(default_factory=list)
    """log P of each id under the distribution it was drawn from; 0 for what a tool wrote."""
    sampled: list[bool] = field(default_factory=list)
    """Whether the model chose the id (a tool's text was given)."""
    messages: list[dict] = field(default_factory=list)
    """Finished messages: assistant, tool, assistant ..."""
    given: deque = field(default_factory=deque)
    """Tokens that must come next."""
    message_start: int = 0
    """Where in `ids` the message being written begins."""
    finish_reason: str = ""
    """stop, length, or empty while running."""


def distribution(logits_BV: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Probabilities that tokens are drawn from: temperature, then top-k, then top-p."""
    if s.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    logits_BV = logits_BV / s.temperature
    if s.top_k:
        least = logits_BV.topk(min(s.top_k, logits_BV.size(1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    probs_BV = torch.softmax(logits_BV, 1)
    if s.top_p < 1:
        ordered, index = probs_BV.sort(1, descending=True)
        beyond = ordered.cumsum(1) - ordered >= s.top_p  # the token that crosses the border stays
        probs_BV = probs_BV.masked_fill(torch.zeros_like(beyond).scatter_(1, index, beyond), 0.0)
        probs_BV = probs_BV / probs_BV.sum(1, keepdim=True)
    return probs_BV


def draw(probs_BV: torch.Tensor, generator: torch.Generator) -> tuple[list[int], list[float]]:
    """One token a row by inverting the cumulative distribution, and the log of its probability."""
    cumulative = probs_BV.double().cumsum(1)
    u = torch.rand(len(probs_BV), 1, generator=generator, dtype=torch.double).to(probs_BV.device) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, u, right=True).clamp_max(probs_BV.size(1) - 1)
    return ids[:, 0].tolist(), probs_BV.gather(1, ids)[:, 0].log().tolist()


@torch.no_grad()
def steps(
    model,
    tokenizer,
    prompts: list[list[int]],
    s: Sampling,
    samples: int = 1,
    run_tool: Callable[[dict], str] | None = None,
) -> Iterator[list[Row]]:
    """Continue every prompt `samples` times; yields all rows after each step. Row p * samples + i belongs to prompt p.

    `run_tool` maps an OpenAI tool call to the tool's answer; without it a call just ends the answer.
    Raises UserError if a prompt leaves no room in the context.
    """
    longest = max(map(len, prompts))
    if longest >= model.config.context:
        raise UserError(f"a prompt of {longest} tokens leaves no room in a context of {model.config.context}")
    generator = torch.Generator().manual_seed(s.seed)
    ends = tokenizer.ends
    device = model.head.device
    rows = [Row(list(p)) for p in prompts for _ in range(samples)]

    padded = torch.zeros(len(prompts), longest, dtype=torch.long)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for i, p in enumerate(prompts):
        padded[i, longest - len(p) :] = torch.tensor(p)
        valid[i, longest - len(p) :] = True
    capacity = longest + s.max_tokens + (64 * TOOL_ROUNDS if run_tool else 0)
    cache = model.new_cache(len(prompts), capacity)
    logits_BV = model(padded.to(device), cache=cache, valid_BT=valid.to(device), last_only=True)[:, 0]
    if samples > 1:
        each = torch.arange(len(prompts), device=device).repeat_interleave(samples)
        cache.keep(each)
        logits_BV = logits_BV[each]

    seats = list(rows)  # whose line of the cache is whose
    running = list(rows)
    while running:
        drawn = draw(distribution(logits_BV, s), generator)
        for row, token, logprob in zip(seats, *drawn):
            if row.finish_reason:
                continue
            was_given = bool(row.given)
            row.ids.append(row.given.popleft() if was_given else token)
            row.logprobs.append(0.0 if was_given else logprob)
            row.sampled.append(not was_given)
            if was_given:
                if not row.given:
                    row.message_start = len(row.ids)
            elif token in ends:
                finish_message(row, tokenizer, run_tool if sum(row.sampled) < s.max_tokens else None)
            elif sum(row.sampled) >= s.max_tokens:
                row.finish_reason = "length"
            elif s.stop and any(text in tokenizer.decode(row.ids[row.message_start :]) for text in s.stop):
                row.finish_reason = "stop"
        for row in running:
            if cache.length >= cache.tokens.size(1):
                row.finish_reason = row.finish_reason or "length"
            unfinished = not row.messages or row.message_start < len(row.ids)
            if row.finish_reason and unfinished and not row.given:  # what a tool says is no message of the model's
                close(row, tokenizer, s)
        yield rows
        running = [row for row in running if not row.finish_reason]
        if running and len(running) <= 0.7 * len(seats):  # moving the cache costs more than a few idle seats
            cache.keep(torch.tensor([j for j, row in enumerate(seats) if not row.finish_reason], device=device))
            seats = running
        if running:
            logits_BV = model(torch.tensor([[row.ids[-1]] for row in seats], device=device), cache=cache)[:, 0]


def finish_message(row: Row, tokenizer, run_tool) -> None:
    """A message has ended: run the tool it calls and queue the answer, or finish the row."""
    message = parse_reply(row.ids[row.message_start :], tokenizer)
    row.messages.append(message)
    row.message_start = len(row.ids)
    rounds = sum(m["role"] == "tool" for m in row.messages)
    if run_tool and "tool_calls" in message and rounds < TOOL_ROUNDS:
        answers = [{"role": "tool", "tool_call_id": c["id"], "content": run_tool(c)} for c in message["tool_calls"]]
        row.messages += answers
        row.given.extend(following(answers, tokenizer))
    else:
        row.finish_reason = "stop"


def close(row: Row, tokenizer, s: Sampling) -> None:
    """The row was cut off: keep what it wrote of its last message, up to a stop text."""
    message = parse_reply(row.ids[row.message_start :], tokenizer)
    cut = min((message["content"].find(t) for t in s.stop if t in message["content"]), default=None)
    row.messages.append(message | {"content": message["content"][:cut]})
    row.message_start = len(row.ids)


def generate(model, tokenizer, prompts, s: Sampling, samples: int = 1, run_tool=None) -> list[Row]:
    """All rows, finished."""
    return deque(steps(model, tokenizer, prompts, s, samples, run_tool), maxlen=1).pop()
