"""Answers in OpenAI's words, whole or in chunks."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator

from nanoghost.serve.client import Running
from nanoghost.serve.generation import Ended, Event, Question, Said, Tally, Told, answer, expected
from nanoghost.serve.model_registry import Known
from nanoghost.serve.schema import ChatRequest, CompletionRequest
from nanoghost.serve.stream_parser import chat_logprobs, completion_logprobs


def model(known: Known, adapters: list[str]) -> dict:
    return {
        "id": known.name, "object": "model", "created": known.created, "owned_by": "nanoghost", "context": known.context,
        "parameters": known.parameters, "adapters": adapters, "tools": known.tools,
    }  # fmt: skip


class Answer:
    """What the two kinds have in common."""

    kind = chunk_kind = prefix = ""

    def __init__(self, service, request, tally: Tally, known: Known):
        self.service, self.request, self.tally, self.known = service, request, tally, known
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        options = request.stream_options
        self.with_usage = bool(options and options.include_usage) or request.timings

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def last(self) -> dict:
        """Usage and, if they were asked for, timings."""
        timings = {"timings": self.tally.timings(self.known.context)} if self.request.timings else {}
        return {"usage": self.tally.usage} | timings

    def count(self) -> None:
        """At the end, however it came."""
        metrics, tally = self.service.metrics, self.tally
        metrics.prompt_tokens.inc(tally.prompt)
        metrics.completion_tokens.inc(tally.completion)
        if tally.first:
            metrics.first_token.observe(tally.first - tally.asked)


class Chat(Answer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service, request: ChatRequest, question: Question, running: Running, asked: float, person=None):
        super().__init__(service, request, Tally(len(question.prompt), asked), question.known)
        self.question, self.running, self.person = question, running, person

    async def events(self) -> AsyncIterator[Event]:
        """As they come; what a person was told goes into their journal, also where they left in the middle."""
        said, ended = "", 0
        answered = answer(self.service.engine, self.question, self.running, self.tally, self.service.pool)
        try:
            async with contextlib.aclosing(answered):
                async for event in answered:
                    match event:
                        case Said():
                            said += event.piece.text
                        case Told():
                            name = event.call["function"]["name"]
                            self.service.metrics.tools.labels(
                                name if name in self.question.server_tools else "unknown"
                            ).inc()
                        case Ended():
                            ended += 1
                    yield event
        finally:
            self.count()
            self.service.metrics.cancelled.inc(ended < self.question.samples)
            if self.person and said:
                self.service.journals.submit(self.person.log_message, "assistant", said)

    def logprobs(self, tokens) -> dict | None:
        return chat_logprobs(self.known.tokenizer, tokens) if self.request.logprobs else None

    async def whole(self) -> dict:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "", "refusal": None},
                "logprobs": None,
                "finish_reason": "",
            }
            for i in range(self.question.samples)
        ]
        tokens, results = [[] for _ in choices], []
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                message = choices[event.sample]["message"]
                match event:
                    case Said():
                        message["content"] += event.piece.text
                        tokens[event.sample] += event.piece.tokens
                        if event.piece.calls:
                            message.setdefault("tool_calls", []).extend(event.piece.calls)
                    case Told():
                        results.append(tool_result(event))
                    case Ended():
                        choices[event.sample]["finish_reason"] = event.reason
        for choice, own in zip(choices, tokens):
            choice["logprobs"] = self.logprobs(own)
            message = choice["message"]
            if choice["finish_reason"] == "tool_calls":
                message["content"] = message["content"] or None
        ran = {"tool_results": results} if results else {}
        return self.head(self.kind) | {"choices": choices} | ran | self.last()

    def chunk(self, sample: int, delta: dict, reason: str | None = None, tokens=()) -> dict:
        choice = {
            "index": sample,
            "delta": delta,
            "logprobs": self.logprobs(tokens) if tokens else None,
            "finish_reason": reason,
        }
        return self.head(self.chunk_kind) | {"choices": [choice]}

    async def chunks(self) -> AsyncIterator[dict]:
        called = [0] * self.question.samples
        begun: set[int] = set()
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                if event.sample not in begun:
                    begun.add(event.sample)
                    yield self.chunk(event.sample, {"role": "assistant", "content": ""})
                match event:
                    case Said(sample, piece):
                        if piece.text or piece.tokens:
                            yield self.chunk(sample, {"content": piece.text}, tokens=piece.tokens)
                        if piece.calls:
                            numbered = [{"index": called[sample] + i} | call for i, call in enumerate(piece.calls)]
                            called[sample] += len(numbered)
                            yield self.chunk(sample, {"tool_calls": numbered})
                    case Told():
                        yield self.head(self.chunk_kind) | {"choices": [], "tool_result": tool_result(event)}
                    case Ended(sample, reason):
                        yield self.chunk(sample, {}, reason)
        if self.with_usage:
            yield self.head(self.chunk_kind) | {"choices": []} | self.last()


def tool_result(event: Told) -> dict:
    function = event.call["function"]
    found = {
        "tool_call_id": event.call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
        "content": event.result.content,
    }
    return found | ({"passages": event.result.passages} if event.result.passages else {})


class Completion(Answer):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, service, request: CompletionRequest, questions: list[Question], running: list[Running], asked: float
    ):
        super().__init__(service, request, Tally(sum(len(q.prompt) for q in questions), asked), questions[0].known)
        self.questions, self.running = questions, running

    def choice(self, index: int, text: str, tokens: list, offset: int, reason: str | None = None) -> dict:
        top = self.request.logprobs
        logprobs = None if top is None else completion_logprobs(self.known.tokenizer, tokens, top, offset)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def events(self, number: int) -> AsyncIterator[tuple[int, str, list, str | None]]:
        """(index of the choice, text, tokens with their probabilities, why it ended) of one prompt, the echoed prompt first."""
        question, running = self.questions[number], self.running[number]
        try:
            first = number * question.samples
            if self.request.echo:
                text = self.known.tokenizer.decode(question.prompt, skip_special=False)
                tokens = list(zip(question.prompt, [None, *await expected(running)])) if question.score else []
                for sample in range(question.samples):
                    yield first + sample, text, tokens, None if question.sampling.max_tokens else "length"
            if not question.sampling.max_tokens:
                return
            async with contextlib.aclosing(
                answer(self.service.engine, question, running, self.tally, self.service.pool)
            ) as events:
                async for event in events:
                    match event:
                        case Said(sample, piece):
                            yield first + sample, piece.text, piece.tokens, None
                        case Ended(sample, reason):
                            yield first + sample, "", [], reason
        finally:
            running.end()

    async def merged(self) -> AsyncIterator[tuple[int, str, list, str | None]]:
        """The same of all prompts, as they come."""
        queue: asyncio.Queue = asyncio.Queue()

        async def one(number: int) -> None:
            try:
                async with contextlib.aclosing(self.events(number)) as events:
                    async for event in events:
                        queue.put_nowait(event)
                queue.put_nowait(None)
            except Exception as e:  # whoever reads the queue gets it
                queue.put_nowait(e)

        tasks = [asyncio.create_task(one(number)) for number in range(len(self.questions))]
        left = len(tasks)
        try:
            while left:
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                left -= event is None
                if event:
                    yield event
        finally:
            self.count()
            self.service.metrics.cancelled.inc(left > 0)
            for task in tasks:
                task.cancel()
            for running in self.running:
                running.end()

    async def whole(self) -> dict:
        count = sum(question.samples for question in self.questions)
        texts, tokens, reasons = [""] * count, [[] for _ in range(count)], [""] * count
        async with contextlib.aclosing(self.merged()) as events:
            async for index, text, some, reason in events:
                texts[index] += text
                tokens[index] += some
                reasons[index] = reason or reasons[index]
        choices = [self.choice(i, texts[i], tokens[i], 0, reasons[i]) for i in range(count)]
        return self.head(self.kind) | {"choices": choices} | self.last()

    async def chunks(self) -> AsyncIterator[dict]:
        offsets = [0] * sum(question.samples for question in self.questions)
        async with contextlib.aclosing(self.merged()) as events:
            async for index, text, some, reason in events:
                if text or some or reason:
                    yield self.head(self.kind) | {"choices": [self.choice(index, text, some, offsets[index], reason)]}
                    offsets[index] += len(text)
        if self.with_usage:
            yield self.head(self.kind) | {"choices": []} | self.last()
