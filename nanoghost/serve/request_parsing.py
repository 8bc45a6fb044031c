"""From a request to a question: which model and adapter, which tokens it reads, what it may write."""

import json
import secrets
from dataclasses import replace

from nanoghost.engine.grammar import grammar_error, json_grammar
from nanoghost.engine.sampler import SamplingParams
from nanoghost.serve.generation import Question
from nanoghost.serve.model_registry import Known, Registry
from nanoghost.serve.schema import ChatRequest, CompletionRequest, Function, Request
from nanoghost.serve.stream_parser import OPENING
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools.registry import Tool

LONGEST = 1024  # tokens of an answer whose request sets no limit; OpenAI's own for plain completions is 16

TOLD = """Some questions are answered better with one of these functions:
<tools>
{functions}
</tools>
To call one, write nothing but its name and arguments in this form:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


class Refused(Exception):
    """A request that cannot be served: what OpenAI's clients make an error of."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def known_model(registry: Registry, name: str) -> Known:
    if not (known := registry.model(name)):
        raise Refused(
            404, f"the model '{name}' does not exist here: /v1/models lists those that do", "model", "model_not_found"
        )
    return known


def chat_question(request: ChatRequest, registry: Registry, tools: dict[str, Tool]) -> Question:
    """Takes milliseconds, and seconds the first time that a person asks (sleep/router.py)."""
    known = known_model(registry, request.model)
    if request.person and not registry.person(request.person):
        raise Refused(
            404,
            f"nobody called '{request.person}' has talked here yet: `nanoghost chat --person` begins",
            "person",
            "person_not_found",
        )
    if unknown := [name for name in request.server_tools or () if name not in tools]:
        raise Refused(
            400,
            f"this server runs no tool called '{unknown[0]}': /tools lists those that it does",
            "server_tools",
            "tool_not_found",
        )
    tokenizer, messages = known.tokenizer, [message.plain() for message in request.messages]
    if request.person and not any(message["role"] == "user" for message in messages):
        raise Refused(400, "a person needs a user message to be answered", "messages")
    mine = {name: tools[name] for name in request.server_tools or ()}
    theirs = [tool.function for tool in request.tools or ()] if request.tool_choice != "none" else []
    told = [function.model_dump(exclude_none=True, exclude={"strict"}) for function in theirs]
    if tokenizer.chat_template:  # our own models have learned the tools that they may have here
        told += [tool.schema for tool in mine.values()]
    if tokenizer.chat_template and tokenizer.chat_template.supports_tools:
        prompt = replace(tokenizer.chat_template, tools=tuple(told)).render(messages, tokenizer, generation=True)[0]
    else:
        prompt = render(informed(messages, told), tokenizer, generation=True)[0]
    grammar, forced = "", False
    if request.response_format and request.response_format.type != "text":
        given = request.response_format.json_schema
        grammar = checked(given.schema_ if given else {"type": "object"}, "response_format")
    elif request.tool_choice not in (None, "none", "auto"):
        named = None if request.tool_choice == "required" else request.tool_choice.function.name
        grammar, forced = checked(call_schema([f for f in theirs if named in (None, f.name)]), "tools"), True
        prompt += mark(tokenizer)
    top = (request.top_logprobs or 0) if request.logprobs else None
    longest = request.max_completion_tokens or request.max_tokens or LONGEST
    voice = known.voice_for(request.person, messages) if request.person else known.voice(known.adapter)
    return Question(
        known, voice, prompt, sampling(request, known, prompt, longest), request.n or 1, request.person or "", top, grammar, forced,
        client_tools=frozenset(f.name for f in theirs), server_tools=mine,
    )  # fmt: skip


def completion_questions(request: CompletionRequest, registry: Registry) -> list[Question]:
    """One for each prompt."""
    known = known_model(registry, request.model)
    tokenizer = known.tokenizer
    longest = 16 if request.max_tokens is None else request.max_tokens
    questions = []
    for given in request.prompts:
        prompt = tokenizer.encode(given) if isinstance(given, str) else given
        prompt = prompt or [max(tokenizer.stop_ids)]  # nothing at all: the beginning of a text
        if max(prompt) >= tokenizer.vocab_size:
            raise Refused(400, f"token {max(prompt)} is not in a vocabulary of {tokenizer.vocab_size}", "prompt")
        score = bool(request.echo) and request.logprobs is not None
        s = sampling(request, known, prompt, longest, room=1 if longest else 0)
        questions.append(
            Question(
                known,
                known.voice(known.adapter),
                prompt,
                s,
                request.n or 1,
                top=request.logprobs,
                score=score,
                plain=True,
            )
        )
    return questions


def sampling(request: Request, known: Known, prompt: list[int], longest: int, room: int = 1) -> SamplingParams:
    """How to write, at most as far as the context reaches. Raises Refused where it leaves less than `room` tokens."""
    left = known.context - len(prompt)
    if left < room:
        message = f"{len(prompt)} tokens leave no room for an answer in a context of {known.context}"
        raise Refused(
            400, message, "messages" if isinstance(request, ChatRequest) else "prompt", "context_length_exceeded"
        )
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = secrets.randbits(48) if request.seed is None else request.seed
    top_p = 1.0 if request.top_p is None else request.top_p
    return SamplingParams(min(longest, left), temperature, top_p=top_p, seed=seed, stop=request.stops)


def informed(messages: list[dict], functions: list[dict]) -> list[dict]:
    """The conversation, its first system message followed by what functions there are."""
    if not functions:
        return messages
    told = TOLD.format(functions="\n".join(json.dumps(function, ensure_ascii=False) for function in functions))
    if messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def mark(tokenizer: Tokenizer) -> list[int]:
    """The beginning of a call, as the model would write it."""
    opening = tokenizer.special_tokens.get(OPENING)
    return [*([opening] if opening is not None else tokenizer.encode(OPENING)), *tokenizer.encode("\n")]


def call_schema(functions: list[Function]) -> dict:
    """JSON of a call of one of these."""
    definitions: dict = {}
    calls = []
    for function in functions:
        parameters = dict(function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):  # their references count from the root
            inner = parameters.pop(key, {})
            if not isinstance(inner, dict):
                raise Refused(400, f"'{key}' of a schema is an object", "tools", "invalid_schema")
            for name, schema in inner.items():
                if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
                    raise Refused(400, f"two functions define '{name}' in different ways", "tools")
        properties = {"name": {"const": function.name}, "arguments": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return definitions | {"anyOf": calls}


def checked(schema: dict, param: str) -> str:
    """The grammar of a schema. Raises Refused for what no grammar can be made of."""
    grammar = json_grammar(schema)
    if wrong := grammar_error(grammar):
        raise Refused(
            400, f"this JSON schema cannot be followed: {wrong.splitlines()[0][:300]}", param, "invalid_schema"
        )
    return grammar
