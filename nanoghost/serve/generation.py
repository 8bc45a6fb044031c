"""A question in, events out: what every sample says, which tools it calls and what they answer, how it ends.

A tool of the server's is run in a thread of this process; then the conversation, longer by its answer, goes to the engine
again, which still has its beginning (paged.py).
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from nanoghost.engine.output_processor import MAX_TOOL_ROUNDS
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.serve.client import EngineClient, Running
from nanoghost.serve.model_registry import Known
from nanoghost.serve.stream_parser import Piece, Reply
from nanoghost.serve.worker import Job, Voice
from nanoghost.tokenizer.chat_format import tool_response_ids
from nanoghost.tools.registry import Tool, ToolResult, call_tool

TOOL_SECONDS = 60.0  # that a tool may take


@dataclass(frozen=True)
class Question:
    known: Known
    voice: Voice
    prompt: list[int]
    sampling: SamplingParams
    """Its stop texts are watched for here, not in the engine."""
    samples: int = 1
    owner: str = ""
    top: int | None = None
    grammar: str = ""
    forced: bool = False
    """The prompt ends with the mark of a call, which the answer completes."""
    score: bool = False
    plain: bool = False
    """No message but a text that goes on: the token that ends it has its place among the probabilities (lm-eval counts on it)."""
    client_tools: frozenset[str] = frozenset()
    server_tools: dict[str, Tool] = field(default_factory=dict)

    @property
    def calls(self) -> bool:
        return bool(self.client_tools or self.server_tools)

    def job(self) -> Job:
        sampling = replace(self.sampling, stop=())
        return Job(
            0, self.voice, tuple(self.prompt), sampling, self.samples, self.owner, self.grammar, self.top, self.score
        )


@dataclass
class Tally:
    """What an answer cost."""

    prompt: int
    asked: float
    completion: int = 0
    context: int = 0
    """Tokens of the longest sample with its prompt."""
    first: float = 0.0
    """When the first token came."""
    last: float = 0.0

    def count(self, tokens: int) -> None:
        self.completion += tokens
        self.last = time.monotonic()
        self.first = self.first or self.last

    @property
    def usage(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }

    def timings(self, context: int) -> dict:
        seconds = self.last - self.first
        return {
            "first_token_seconds": round(self.first - self.asked, 4) if self.first else None,
            "tokens_per_second": round((self.completion - 1) / seconds, 2) if seconds > 0 else None,
            "context_used": self.context,
            "context": context,
        }


@dataclass(frozen=True)
class Said:
    sample: int
    piece: Piece


@dataclass(frozen=True)
class Told:
    """What a tool of the server's answered."""

    sample: int
    call: dict
    result: ToolResult


@dataclass(frozen=True)
class Ended:
    sample: int
    reason: str


Event = Said | Told | Ended


async def answer(
    engine: EngineClient, question: Question, running: Running, tally: Tally, pool: ThreadPoolExecutor
) -> AsyncIterator[Event]:
    """The events of all samples as they come; closing it cancels what still runs."""
    events: asyncio.Queue = asyncio.Queue()

    async def one(sample: int) -> None:
        try:
            async with contextlib.aclosing(speak(engine, question, running, sample, tally, pool)) as said:
                async for event in said:
                    events.put_nowait(event)
        except Exception as e:  # whoever reads the events gets it
            events.put_nowait(e)

    tasks = [asyncio.create_task(one(sample)) for sample in range(question.samples)]
    try:
        left = len(tasks)
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Ended)
            yield event
    finally:
        for task in tasks:
            task.cancel()
        running.end()


async def speak(
    engine: EngineClient, question: Question, running: Running, sample: int, tally: Tally, pool
) -> AsyncIterator[Event]:
    """One sample, with the tools it calls."""
    tokenizer, sampling = question.known.tokenizer, question.sampling
    prompt, number, left = question.prompt, sample, sampling.max_tokens
    for turn in range(MAX_TOOL_ROUNDS + 1):
        reply = Reply(tokenizer, sampling.stop, question.calls, question.forced and not turn, question.plain)
        written, calls, reason = [], [], ""
        try:
            async for delta in running.deltas(number):
                tally.count(len(delta.ids))
                written += delta.ids
                tally.context = max(tally.context, len(prompt) + len(written))
                pieces = [reply.feed(delta.ids, delta.likely)]
                reason = "stop" if reply.stopped else delta.finish_reason
                if reason:
                    pieces.append(reply.finish())
                for piece in pieces:
                    calls += piece.calls
                    if piece.text or piece.calls or piece.tokens:
                        yield Said(sample, piece)
                if reason:
                    break
        finally:
            running.end(number)
        left -= len(written)
        done = reply.stopped or reason != "stop" or turn == MAX_TOOL_ROUNDS
        if (
            calls
            and reason == "stop"
            and (not question.server_tools or any(call["function"]["name"] in question.client_tools for call in calls))
        ):
            reason, done = "tool_calls", True
        if not calls or done:
            yield Ended(sample, reason)
            return
        answers = []
        for call in calls:
            result = await in_a_thread(call, question.server_tools, pool)
            yield Told(sample, call, result)
            answers.append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
        prompt = prompt + written + tool_response_ids(answers, tokenizer)
        left = min(left, question.known.context - len(prompt))
        if left < 1:
            yield Ended(sample, "length")
            return
        more = replace(
            question,
            prompt=prompt,
            samples=1,
            sampling=replace(sampling, max_tokens=left, seed=sampling.seed + 1 + sample + turn),
        )
        running, number = engine.submit(more.job(), begun=True), 0


async def in_a_thread(call: dict, tools: dict[str, Tool], pool: ThreadPoolExecutor) -> ToolResult:
    work = asyncio.get_running_loop().run_in_executor(pool, call_tool, call, tools)
    try:
        return await asyncio.wait_for(work, TOOL_SECONDS)
    except TimeoutError:
        return ToolResult(f"error: the tool took longer than {TOOL_SECONDS:.0f} seconds")
    except UserError as e:  # the sandbox cannot be prepared: whoever runs the server is told how to mend it
        print(f"{call['function']['name']}: {e}", file=sys.stderr, flush=True)
        return ToolResult("error: this tool does not work here now")


async def expected(running: Running) -> list:
    """What was expected in place of each of the prompt's tokens after the first."""
    return [likely async for delta in running.deltas(-1) for likely in delta.likely]
