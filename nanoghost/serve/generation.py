"""Runs a request: its samples as a stream of events (text, results of tool calls, the end of a sample).

A tool of the server runs in a thread of this process. Then the conversation with the tool's result goes back to the
engine, whose prefix cache still holds everything before the result.
"""

import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from nanoghost.engine.logits_processors import TopLogprobs
from nanoghost.engine.output_processor import MAX_TOOL_ROUNDS
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.serve.client import EngineClient, RequestHandle
from nanoghost.serve.engine_messages import PROMPT_SAMPLE, EngineRequest, ModelRef
from nanoghost.serve.model_registry import ModelInfo
from nanoghost.tokenizer.chat_format import tool_response_ids
from nanoghost.tokenizer.reply_parser import ReplyDelta, ReplyParser
from nanoghost.tools.base import Tool, ToolResult
from nanoghost.tools.registry import call_tool

TOOL_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class GenerationRequest:
    """An API request with its prompt as tokens, its model, its sampling settings and its tools."""

    model: ModelInfo
    model_ref: ModelRef
    prompt_ids: list[int]
    sampling: SamplingParams
    """Its stop texts are handled in this process, not in the engine."""
    num_samples: int = 1
    owner: str = ""
    top_logprobs: int | None = None
    grammar: str = ""
    forced_call: bool = False
    """The prompt ends with the opening tag of a tool call, and the reply is the call."""
    prompt_logprobs: bool = False
    is_plain_text: bool = False
    """The prompt is a text to continue, not a conversation. The stop token then has an entry in the log-probabilities,
    which lm-eval relies on."""
    client_tools: frozenset[str] = frozenset()
    server_tools: dict[str, Tool] = field(default_factory=dict)
    keep_malformed: bool = True
    """A call that cannot be read stays in the text, as OpenAI's clients expect. A person, who reads it on the page,
    expects no JSON."""

    @property
    def has_tools(self) -> bool:
        return bool(self.client_tools or self.server_tools)

    def engine_request(self) -> EngineRequest:
        return EngineRequest(
            request_id=0,  # the client assigns one
            model=self.model_ref,
            prompt_ids=tuple(self.prompt_ids),
            sampling=replace(self.sampling, stop=()),
            num_samples=self.num_samples,
            owner=self.owner,
            grammar=self.grammar,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


@dataclass
class Usage:
    """Tokens and times of a request. Times are seconds of time.monotonic()."""

    prompt_tokens: int
    received: float
    """Time when the request arrived."""
    completion_tokens: int = 0
    context_used: int = 0
    """Tokens of the longest sample, prompt included."""
    first_token: float = 0.0
    """Time of the first token; 0 before it."""
    last_token: float = 0.0

    def count(self, num_tokens: int) -> None:
        self.completion_tokens += num_tokens
        self.last_token = time.monotonic()
        self.first_token = self.first_token or self.last_token

    def to_json(self) -> dict:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def timings(self, context: int) -> dict:
        seconds = self.last_token - self.first_token
        return {
            "first_token_seconds": round(self.first_token - self.received, 4) if self.first_token else None,
            "tokens_per_second": round((self.completion_tokens - 1) / seconds, 2) if seconds > 0 else None,
            "context_used": self.context_used,
            "context": context,
        }


@dataclass(frozen=True)
class TextDelta:
    """New text and tool calls of a sample."""

    sample: int
    delta: ReplyDelta


@dataclass(frozen=True)
class ToolCallResult:
    """A call that the server ran, with its result."""

    sample: int
    call: dict
    result: ToolResult


@dataclass(frozen=True)
class Finished:
    """The end of a sample."""

    sample: int
    reason: str


Event = TextDelta | ToolCallResult | Finished


async def generate(
    engine: EngineClient, request: GenerationRequest, handle: RequestHandle, usage: Usage, pool: ThreadPoolExecutor
) -> AsyncIterator[Event]:
    """The events of all samples as they come. Closing the iterator cancels the samples that are still running."""
    streams = []
    for sample in range(request.num_samples):
        streams.append(generate_sample(engine, request, handle, sample, usage, pool))
    try:
        async with contextlib.aclosing(merge(streams)) as events:
            async for event in events:
                yield event
    finally:
        handle.cancel()


async def generate_sample(
    engine: EngineClient,
    request: GenerationRequest,
    handle: RequestHandle,
    sample: int,
    usage: Usage,
    pool: ThreadPoolExecutor,
) -> AsyncIterator[Event]:
    """The events of one sample: messages, and between them the results of the server's tools."""
    tokenizer = request.model.tokenizer
    sampling = request.sampling
    prompt_ids = request.prompt_ids
    tokens_left = sampling.max_tokens
    engine_sample = sample  # its number in the engine's request; after a tool call the sample has a request of its own
    for tool_round in range(MAX_TOOL_ROUNDS + 1):
        parser = ReplyParser(
            tokenizer,
            sampling.stop,
            parse_calls=request.has_tools or not request.keep_malformed,
            forced_call=request.forced_call and tool_round == 0,
            keep_stop_token=request.is_plain_text,
            keep_malformed=request.keep_malformed,
        )
        message = GeneratedMessage(parser)
        try:
            deltas = message_deltas(handle, engine_sample, message, usage, len(prompt_ids))
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    yield TextDelta(sample, delta)
        finally:
            handle.cancel(engine_sample)
        tokens_left -= len(message.token_ids)
        if message.finish_reason != "stop" or not message.tool_calls:
            yield Finished(sample, message.finish_reason)
            return
        if calls_go_to_client(message.tool_calls, request):
            yield Finished(sample, "tool_calls")
            return
        if parser.stopped or tool_round == MAX_TOOL_ROUNDS:
            yield Finished(sample, "stop")
            return
        result_messages = []
        for call in message.tool_calls:
            result = await run_tool_in_thread(call, request.server_tools, pool)
            yield ToolCallResult(sample, call, result)
            result_messages.append({"role": "tool", "tool_call_id": call["id"], "content": result.content})
        prompt_ids = prompt_ids + message.token_ids + tool_response_ids(result_messages, tokenizer)
        tokens_left = min(tokens_left, request.model.context - len(prompt_ids))
        if tokens_left < 1:
            yield Finished(sample, "length")
            return
        seed = sampling.seed + 1 + sample + tool_round  # each round gets other random numbers, and each sample, too
        next_sampling = replace(sampling, max_tokens=tokens_left, seed=seed)
        next_request = replace(request, prompt_ids=prompt_ids, num_samples=1, sampling=next_sampling)
        handle = engine.submit(next_request.engine_request(), is_continuation=True)
        engine_sample = 0


@dataclass
class GeneratedMessage:
    """One message of a sample while it is generated."""

    parser: ReplyParser
    token_ids: list[int] = field(default_factory=list)
    tool_calls: list[dict] = field(default_factory=list)
    finish_reason: str = ""


async def message_deltas(
    handle: RequestHandle, engine_sample: int, message: GeneratedMessage, usage: Usage, num_prompt_tokens: int
) -> AsyncIterator[ReplyDelta]:
    """Generate one message: yields what is new and fills `message`."""
    async for tokens in handle.deltas(engine_sample):
        usage.count(len(tokens.token_ids))
        message.token_ids += tokens.token_ids
        usage.context_used = max(usage.context_used, num_prompt_tokens + len(message.token_ids))
        deltas = [message.parser.feed(tokens.token_ids, tokens.logprobs)]
        message.finish_reason = "stop" if message.parser.stopped else tokens.finish_reason
        if message.finish_reason:
            deltas.append(message.parser.finish())
        for delta in deltas:
            for call in delta.tool_calls:
                call["id"] = f"call_{secrets.token_hex(12)}"  # unique in the conversation, not only in the message
            message.tool_calls += delta.tool_calls
            if delta.text or delta.tool_calls or delta.tokens:
                yield delta
        if message.finish_reason:
            return


def calls_go_to_client(tool_calls: list[dict], request: GenerationRequest) -> bool:
    """Whether the client runs these calls: it does if one of them is its own, or if the server has no tools here."""
    names = {call["function"]["name"] for call in tool_calls}
    return not request.server_tools or not names.isdisjoint(request.client_tools)


async def run_tool_in_thread(call: dict, tools: dict[str, Tool], pool: ThreadPoolExecutor) -> ToolResult:
    future = asyncio.get_running_loop().run_in_executor(pool, call_tool, call, tools)
    try:
        return await asyncio.wait_for(future, TOOL_TIMEOUT)
    except TimeoutError:
        return ToolResult(f"error: the tool took longer than {TOOL_TIMEOUT:.0f} seconds")
    except UserError as error:  # the sandbox cannot be prepared: the operator of the server sees why
        print(f"{call['function']['name']}: {error}", file=sys.stderr, flush=True)
        return ToolResult("error: this tool is out of order")


async def read_prompt_logprobs(handle: RequestHandle) -> list[TopLogprobs]:
    """The log-probabilities of the prompt's tokens, from the second on."""
    logprobs = []
    async for delta in handle.deltas(PROMPT_SAMPLE):
        logprobs += delta.logprobs
    return logprobs


async def merge(streams: list[AsyncIterator]) -> AsyncIterator:
    """The items of several streams as they come. The first error is raised. At the end, all streams are closed."""
    queue: asyncio.Queue = asyncio.Queue()  # the items and, at the end of each stream, its task

    async def forward(stream: AsyncIterator) -> None:
        async with contextlib.aclosing(stream):
            async for item in stream:
                queue.put_nowait(item)

    tasks = [asyncio.create_task(forward(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_running = len(tasks)
    try:
        while num_running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                num_running -= 1
                item.result()  # raises the error of the task, if there is one
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
