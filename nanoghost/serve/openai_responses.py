"""Responses in OpenAI's form, complete or in chunks."""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from nanoghost.engine.logits_processors import TopLogprobs
from nanoghost.memory.store import Person
from nanoghost.serve.client import RequestHandle
from nanoghost.serve.generation import (
    Event,
    Finished,
    GenerationRequest,
    TextDelta,
    ToolCallResult,
    Usage,
    generate,
    merge,
    read_prompt_logprobs,
)
from nanoghost.serve.model_registry import ModelInfo
from nanoghost.serve.openai_logprobs import chat_logprobs, completion_logprobs
from nanoghost.serve.schema import ChatRequest, CommonRequest, CompletionRequest
from nanoghost.serve.service import Service


def model_entry(info: ModelInfo, adapters: list[str]) -> dict:
    return {
        "id": info.name,
        "object": "model",
        "created": info.created,
        "owned_by": "nanoghost",
        "context": info.context,
        "parameters": info.parameters,
        "adapters": adapters,
        "tools": info.supports_tools,
        "learned_tools": info.learned_tools,
    }


class ResponseBase:
    """What responses to chat and plain completions have in common."""

    object_type = ""
    chunk_type = ""
    id_prefix = ""

    def __init__(self, service: Service, request: CommonRequest, usage: Usage, model: ModelInfo):
        self.service = service
        self.request = request
        self.usage = usage
        self.model = model
        self.id = f"{self.id_prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        options = request.stream_options
        self.streams_usage = request.timings or bool(options and options.include_usage)
        """Whether a stream ends with a chunk of usage."""

    def header(self, object_type: str) -> dict:
        """The fields at the beginning of the response and of each chunk."""
        return {"id": self.id, "object": object_type, "created": self.created, "model": self.request.model}

    def usage_fields(self) -> dict:
        """The fields at the end of the response, or of the last chunk."""
        fields = {"usage": self.usage.to_json()}
        if self.request.timings:
            fields["timings"] = self.usage.timings(self.model.context)
        return fields

    def record_metrics(self, cancelled: bool) -> None:
        """Called once, however the request ended."""
        metrics = self.service.metrics
        metrics.prompt_tokens.inc(self.usage.prompt_tokens)
        metrics.completion_tokens.inc(self.usage.completion_tokens)
        if self.usage.first_token:
            metrics.first_token.observe(self.usage.first_token - self.usage.received)
        if cancelled:
            metrics.cancelled.inc()


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ChatResponse(ResponseBase):
    object_type, chunk_type, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        generation: GenerationRequest,
        handle: RequestHandle,
        received: float,
        person: Person | None = None,
    ):
        super().__init__(service, request, Usage(len(generation.prompt_ids), received), generation.model)
        self.generation = generation
        self.handle = handle
        self.person = person

    async def events(self) -> AsyncIterator[Event]:
        """The events as they come. At the end, also an early one, the reply to a person is added to their chat log."""
        reply, num_finished = "", 0
        service = self.service
        events = generate(service.engine, self.generation, self.handle, self.usage, service.tool_threads)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    match event:
                        case TextDelta():
                            reply += event.delta.text
                        case ToolCallResult():
                            self.count_tool_call(event.call["function"]["name"])
                        case Finished():
                            num_finished += 1
                    yield event
        finally:
            self.record_metrics(cancelled=num_finished < self.generation.num_samples)
            if self.person and reply:
                service.chat_log_thread.submit(self.person.log_message, "assistant", reply)

    def count_tool_call(self, name: str) -> None:
        if name not in self.generation.server_tools:
            name = "unknown"  # the model invented it: it must not become a label of a metric
        self.service.metrics.tool_calls.labels(name).inc()

    def logprobs(self, tokens: list[tuple[int, TopLogprobs]]) -> dict | None:
        return chat_logprobs(self.model.tokenizer, tokens) if self.request.logprobs else None

    async def complete(self) -> dict:
        """The response as one object."""
        choices = [ChatChoice() for _ in range(self.generation.num_samples)]
        tool_results = []
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                choice = choices[event.sample]
                match event:
                    case TextDelta():
                        choice.content += event.delta.text
                        choice.tool_calls += event.delta.tool_calls
                        choice.tokens += event.delta.tokens
                    case ToolCallResult():
                        tool_results.append(tool_result_entry(event))
                    case Finished():
                        choice.finish_reason = event.reason
        response = self.header(self.object_type)
        response["choices"] = [choice.to_json(i, self.logprobs(choice.tokens)) for i, choice in enumerate(choices)]
        if tool_results:
            response["tool_results"] = tool_results
        return response | self.usage_fields()

    async def chunks(self) -> AsyncIterator[dict]:
        """The response as chunks for a stream."""
        num_calls = [0] * self.generation.num_samples
        started: set[int] = set()
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                if event.sample not in started:
                    started.add(event.sample)
                    yield self.chunk(event.sample, {"role": "assistant", "content": ""})
                match event:
                    case TextDelta(sample, delta):
                        if delta.text or delta.tokens:
                            yield self.chunk(sample, {"content": delta.text}, tokens=delta.tokens)
                        if delta.tool_calls:
                            calls = [{"index": i} | call for i, call in enumerate(delta.tool_calls, num_calls[sample])]
                            num_calls[sample] += len(calls)
                            yield self.chunk(sample, {"tool_calls": calls})
                    case ToolCallResult():
                        yield self.header(self.chunk_type) | {"choices": [], "tool_result": tool_result_entry(event)}
                    case Finished(sample, reason):
                        yield self.chunk(sample, {}, reason)
        if self.streams_usage:
            yield self.header(self.chunk_type) | {"choices": []} | self.usage_fields()

    def chunk(self, sample: int, delta: dict, reason: str | None = None, tokens=()) -> dict:
        choice = {
            "index": sample,
            "delta": delta,
            "logprobs": self.logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        return self.header(self.chunk_type) | {"choices": [choice]}


@dataclass
class ChatChoice:
    """One sample of a complete chat response."""

    content: str = ""
    tool_calls: list[dict] = field(default_factory=list)
    tokens: list[tuple[int, TopLogprobs]] = field(default_factory=list)
    finish_reason: str = ""

    def to_json(self, index: int, logprobs: dict | None) -> dict:
        content: str | None = self.content
        if not content and self.finish_reason == "tool_calls":
            content = None
        message = {"role": "assistant", "content": content, "refusal": None}
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def tool_result_entry(event: ToolCallResult) -> dict:
    function = event.call["function"]
    entry = {
        "tool_call_id": event.call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
        "content": event.result.content,
    }
    if event.result.passages:
        entry["passages"] = event.result.passages
    return entry


# ── plain completions ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class ChoiceDelta:
    """New text and tokens of one choice of a plain completion."""

    index: int
    text: str = ""
    tokens: list[tuple[int, TopLogprobs | None]] = field(default_factory=list)
    finish_reason: str | None = None


class CompletionResponse(ResponseBase):
    object_type = chunk_type = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        generations: list[GenerationRequest],
        handles: list[RequestHandle],
        received: float,
    ):
        """`generations`: one for each prompt. Choice p * n + i is sample i of prompt p."""
        num_tokens = sum(len(generation.prompt_ids) for generation in generations)
        super().__init__(service, request, Usage(num_tokens, received), generations[0].model)
        self.generations = generations
        self.handles = handles
        self.num_choices = sum(generation.num_samples for generation in generations)

    async def deltas(self) -> AsyncIterator[ChoiceDelta]:
        """The deltas of all choices as they come."""
        num_finished = 0
        streams = [self.prompt_deltas(i) for i in range(len(self.generations))]
        try:
            async with contextlib.aclosing(merge(streams)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason:
                        num_finished += 1
                    yield delta
        finally:
            self.record_metrics(cancelled=num_finished < self.num_choices)
            for handle in self.handles:
                handle.cancel()

    async def prompt_deltas(self, prompt: int) -> AsyncIterator[ChoiceDelta]:
        """The deltas of one prompt's choices; with `echo` the prompt itself comes first."""
        generation, handle = self.generations[prompt], self.handles[prompt]
        first_choice = prompt * generation.num_samples
        max_tokens = generation.sampling.max_tokens
        try:
            if self.request.echo:
                text = self.model.tokenizer.decode(generation.prompt_ids, skip_special=False)
                tokens = []
                if generation.prompt_logprobs:
                    logprobs = await read_prompt_logprobs(handle)
                    tokens = list(zip(generation.prompt_ids, [None, *logprobs]))
                finish_reason = None if max_tokens else "length"
                for sample in range(generation.num_samples):
                    yield ChoiceDelta(first_choice + sample, text, tokens, finish_reason)
            if not max_tokens:
                return
            service = self.service
            events = generate(service.engine, generation, handle, self.usage, service.tool_threads)
            async with contextlib.aclosing(events):
                async for event in events:
                    match event:
                        case TextDelta(sample, delta):
                            yield ChoiceDelta(first_choice + sample, delta.text, delta.tokens)
                        case Finished(sample, reason):
                            yield ChoiceDelta(first_choice + sample, finish_reason=reason)
        finally:
            handle.cancel()

    async def complete(self) -> dict:
        """The response as one object."""
        choices = [ChoiceDelta(i, finish_reason="") for i in range(self.num_choices)]
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                choice = choices[delta.index]
                choice.text += delta.text
                # A new list, not +=: with `echo`, the samples of a prompt share the list of its tokens.
                choice.tokens = choice.tokens + delta.tokens
                choice.finish_reason = delta.finish_reason or choice.finish_reason
        entries = [self.choice_entry(choice, text_offset=0) for choice in choices]
        return self.header(self.object_type) | {"choices": entries} | self.usage_fields()

    async def chunks(self) -> AsyncIterator[dict]:
        """The response as chunks for a stream."""
        text_offsets = [0] * self.num_choices
        async with contextlib.aclosing(self.deltas()) as deltas:
            async for delta in deltas:
                if not (delta.text or delta.tokens or delta.finish_reason):
                    continue
                entry = self.choice_entry(delta, text_offsets[delta.index])
                text_offsets[delta.index] += len(delta.text)
                yield self.header(self.chunk_type) | {"choices": [entry]}
        if self.streams_usage:
            yield self.header(self.chunk_type) | {"choices": []} | self.usage_fields()

    def choice_entry(self, choice: ChoiceDelta, text_offset: int) -> dict:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = completion_logprobs(self.model.tokenizer, choice.tokens, self.request.logprobs, text_offset)
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
