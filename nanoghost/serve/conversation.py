"""A conversation with a model in this process: its messages, and replies streamed as text fragments and tool calls."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path

from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.output_processor import reads_calls
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.errors import UserError
from nanoghost.home import line_history, open_model
from nanoghost.tokenizer.chat_format import render, truncate_oldest_turns
from nanoghost.tokenizer.reply_parser import ReplyParser
from nanoghost.tools.registry import run_tool, tools_for_model

MALFORMED_CALL = "(a tool call that cannot be read)"
MIN_REPLY_TOKENS = 8  # tokens of the context that a message must leave for the reply


@dataclass(frozen=True)
class ReplyFragment:
    """A part of a reply: text as it is generated, or one line about a tool call that was run."""

    text: str
    is_tool_call: bool = False


class Conversation:
    """A model, the messages so far, and how replies are sampled."""

    def __init__(
        self,
        model: str | None,
        sampling: SamplingParams,
        system: str | None,
        documents: Path | None = None,
        tools: str | None = None,
        adapter: Path | None = None,
    ):
        """`model`: default is the one finished last; `documents`: the folder that the tool `lookup` searches;
        `tools`: names for tools_for_model; `adapter`: the folder of an adapter to load instead of the model's own."""
        self.folder = open_model(model)
        self.engine = open_engine(self.folder, adapter=adapter)
        self.tokenizer = self.engine.tokenizer
        self.sampling = sampling
        self.num_replies = 0
        self.line_history = line_history()
        """File of the lines typed in earlier sessions of the terminal."""
        self.messages: list[dict] = []
        self.dropped_messages: list[dict] = []
        """Oldest messages, which no longer fit into the context."""
        self.set_system(system)
        offered = tools_for_model(self.folder, self.tokenizer.chat_template, documents, tools)
        self.tool_schemas = [tool.schema for tool in offered.values()]
        self.run_tool = partial(run_tool, tools=offered) if offered else None

    def set_system(self, text: str | None) -> None:
        """Replace or remove the system message."""
        system = [{"role": "system", "content": text}] if text else []
        self.messages = system + without_system(self.messages)

    @property
    def transcript(self) -> list[dict]:
        """The whole conversation, with the messages that no longer fit into the context."""
        return system_messages(self.messages) + self.dropped_messages + without_system(self.messages)

    def reset(self) -> None:
        """Drop everything except the system message."""
        self.messages = system_messages(self.messages)
        self.dropped_messages = []

    def render_prompt(self, messages: list[dict]) -> list[int]:
        ids, _ = render(messages, self.tokenizer, add_generation_prompt=True, tools=self.tool_schemas)
        return ids

    def truncate(self, messages: list[dict], max_tokens: int) -> list[dict]:
        return truncate_oldest_turns(
            messages, self.tokenizer, max_tokens, add_generation_prompt=True, tools=self.tool_schemas
        )

    def ask(self, text: str) -> int:
        """Add a user message; returns how many of the oldest messages were dropped to make room for it.

        Raises UserError if the message alone does not fit into the context.
        """
        context = self.engine.runner.context
        reply_tokens = max(MIN_REPLY_TOKENS, min(self.sampling.max_tokens, context // 2))
        text = text.encode(errors="replace").decode()  # input that is not UTF-8 is read as lone surrogates
        extended = [*self.messages, {"role": "user", "content": text}]
        remaining = self.truncate(extended, context - reply_tokens)
        num_tokens = len(self.render_prompt(remaining))
        if num_tokens > context - MIN_REPLY_TOKENS:
            raise UserError(
                f"the message takes {num_tokens} tokens with the system message; this model's context holds {context}"
            )
        num_dropped = len(extended) - len(remaining)
        self.dropped_messages += without_system(extended)[:num_dropped]
        self.messages = remaining
        return num_dropped

    def prompt_messages(self) -> list[dict]:
        """What the model reads before it replies."""
        return self.messages

    def answer(self) -> Iterator[ReplyFragment]:
        """Stream the reply to the last message and add it to the messages.

        Closing the iterator early keeps what was generated until then.
        """
        prompt_ids = self.render_prompt(self.prompt_messages())
        sampling = replace(self.sampling, seed=self.sampling.seed + self.num_replies)
        self.num_replies += 1
        num_messages = len(self.messages)
        [sequence] = self.engine.add(prompt_ids, sampling, run_tool=self.run_tool)
        # It is the only sequence, so it may fill the context: the result of a tool can be long.
        sequence.max_len = self.engine.runner.context
        try:
            yield from stream_fragments(self.engine, sequence)
        finally:
            self.engine.cancel(sequence)
            replies = list(sequence.messages)
            unfinished_ids = sequence.completion_ids[sequence.message_start :]
            parser = reply_parser(self.engine, sequence)
            unfinished_text = parser.feed(unfinished_ids).text  # without an unfinished call
            if unfinished_text:
                replies.append({"role": "assistant", "content": unfinished_text})
            self.messages = self.messages[:num_messages] + replies


def system_messages(messages: list[dict]) -> list[dict]:
    return [message for message in messages if message["role"] == "system"]


def without_system(messages: list[dict]) -> list[dict]:
    return [message for message in messages if message["role"] != "system"]


def reply_parser(engine: Engine, sequence: Sequence) -> ReplyParser:
    """A parser of a message whose text is for people: calls that cannot be read are not part of it."""
    return ReplyParser(engine.tokenizer, parse_calls=reads_calls(sequence, engine.tokenizer), keep_malformed=False)


def stream_fragments(engine: Engine, sequence: Sequence) -> Iterator[ReplyFragment]:
    """Run the engine until the sequence is finished; yields its text as it grows, and its tool calls with results."""
    parser = reply_parser(engine, sequence)
    num_ids = 0
    num_messages = 0
    functions: dict[str, dict] = {}  # that the current message calls, by call id
    needs_newline = False  # before a tool call: text was yielded on this line
    while not sequence.finish_reason:
        engine.step()
        new_ids = sampled_ids(sequence, num_ids)
        new_messages = sequence.messages[num_messages:]
        num_ids = len(sequence.completion_ids)
        num_messages = len(sequence.messages)
        deltas = [parser.feed(new_ids)]
        if new_messages:
            deltas.append(parser.finish())
            parser = reply_parser(engine, sequence)
        text = "".join(delta.text for delta in deltas)
        if text:
            needs_newline = True
            yield ReplyFragment(text)
        lines = [MALFORMED_CALL for delta in deltas for _ in delta.malformed_calls]
        for message in new_messages:
            if message["role"] == "assistant":
                functions = {call["id"]: call["function"] for call in message.get("tool_calls", ())}
                continue
            lines.append(f"{format_call(functions[message['tool_call_id']])} → {message['content']}")
        for line in lines:
            if needs_newline:
                yield ReplyFragment("\n")
            needs_newline = False
            yield ReplyFragment(line, is_tool_call=True)


def sampled_ids(sequence: Sequence, start: int) -> list[int]:
    """The completion tokens from `start` on, without tool results."""
    return list(compress(sequence.completion_ids[start:], sequence.sampled_mask[start:]))


def format_call(function: dict) -> str:
    """A tool call as it is shown: calculator(12+30)."""
    arguments = json.loads(function["arguments"])
    values = arguments.values() if isinstance(arguments, dict) else [arguments]
    return f"{function['name']}({', '.join(str(value).strip() for value in values)})"
