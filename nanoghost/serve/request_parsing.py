"""Turns API requests into GenerationRequests: which model and adapter, which prompt, how to sample."""

import json
import secrets

from nanoghost.engine.grammar import grammar_error, json_grammar
from nanoghost.engine.sampler import SamplingParams
from nanoghost.serve.generation import GenerationRequest
from nanoghost.serve.http_errors import RequestError
from nanoghost.serve.model_registry import ModelInfo, ModelRegistry
from nanoghost.serve.schema import ChatRequest, CommonRequest, CompletionRequest, Function
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.reply_parser import TOOL_CALL_START
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools.base import Tool

DEFAULT_CHAT_TOKENS = 1024  # maximum length of a reply if the request sets none
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default

# For models whose chat template has no place for tools. Part of the prompt: changing it changes replies.
TOOLS_PROMPT = """Some questions are answered better with one of these functions:
<tools>
{functions}
</tools>
To call one, write nothing but its name and arguments in this form:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def find_model(registry: ModelRegistry, name: str) -> ModelInfo:
    info = registry.model(name)
    if info is None:
        message = f"the model '{name}' does not exist; GET /v1/models lists the available models"
        raise RequestError(404, message, "model", "model_not_found")
    return info


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse_chat_request(request: ChatRequest, registry: ModelRegistry, tools: dict[str, Tool]) -> GenerationRequest:
    """`tools`: those of the server. Takes milliseconds, and seconds when the router is trained (memory/router.py)."""
    model = find_model(registry, request.model)
    messages = [message.to_chat_format() for message in request.messages]
    check_person(request, registry, messages)
    server_tools = select_server_tools(request, tools)
    client_functions = []
    if request.tool_choice != "none":
        client_functions = [tool.function for tool in request.tools or ()]

    prompt_ids = render_prompt(messages, model.tokenizer, client_functions, server_tools)
    grammar, forced_call = "", False
    if request.response_format and request.response_format.type != "text":
        json_schema = request.response_format.json_schema
        schema = json_schema.schema_ if json_schema else {"type": "object"}
        grammar = compile_grammar(schema, "response_format")
    elif request.tool_choice not in (None, "none", "auto"):
        forced_call = True
        grammar = compile_grammar(calls_schema(selected_functions(request, client_functions)), "tools")
        prompt_ids += tool_call_header(model.tokenizer)
    max_tokens = request.max_completion_tokens or request.max_tokens or DEFAULT_CHAT_TOKENS
    if request.person:
        model_ref = model.ref_for_person(request.person, messages)
    else:
        model_ref = model.ref(model.adapter)
    return GenerationRequest(
        model=model,
        model_ref=model_ref,
        prompt_ids=prompt_ids,
        sampling=sampling_params(request, model, prompt_ids, max_tokens),
        num_samples=request.n or 1,
        owner=request.person or "",
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        grammar=grammar,
        forced_call=forced_call,
        client_tools=frozenset(function.name for function in client_functions),
        server_tools=server_tools,
        keep_malformed=request.server_tools is None,
    )


def check_person(request: ChatRequest, registry: ModelRegistry, messages: list[dict]) -> None:
    if not request.person:
        return
    if not registry.person(request.person):
        message = f"the person '{request.person}' does not exist; `nanoghost chat --person` creates one"
        raise RequestError(404, message, "person", "person_not_found")
    if not any(message["role"] == "user" for message in messages):
        raise RequestError(400, "a request with a person needs a user message", "messages")


def select_server_tools(request: ChatRequest, tools: dict[str, Tool]) -> dict[str, Tool]:
    names = request.server_tools or []
    for name in names:
        if name not in tools:
            message = f"this server has no tool '{name}'; GET /tools lists the available tools"
            raise RequestError(400, message, "server_tools", "tool_not_found")
    return {name: tools[name] for name in names}


def render_prompt(
    messages: list[dict], tokenizer: Tokenizer, client_functions: list[Function], server_tools: dict[str, Tool]
) -> list[int]:
    schemas = [function.model_dump(exclude_none=True, exclude={"strict"}) for function in client_functions]
    if tokenizer.chat_template:  # models trained here know the server's tools from their training
        schemas += [tool.schema for tool in server_tools.values()]
    if tokenizer.chat_template and tokenizer.chat_template.supports_tools:
        ids, _ = render(messages, tokenizer, add_generation_prompt=True, tools=schemas)
    else:
        ids, _ = render(with_tools_in_system_message(messages, schemas), tokenizer, add_generation_prompt=True)
    return ids


def with_tools_in_system_message(messages: list[dict], schemas: list[dict]) -> list[dict]:
    if not schemas:
        return messages
    functions = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas)
    prompt = TOOLS_PROMPT.format(functions=functions)
    if messages[0]["role"] == "system":
        system = messages[0] | {"content": f"{messages[0]['content']}\n\n{prompt}"}
        return [system, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def tool_call_header(tokenizer: Tokenizer) -> list[int]:
    """The beginning of a tool call as the model would write it."""
    tag_id = tokenizer.special_tokens.get(TOOL_CALL_START)
    tag = tokenizer.encode(TOOL_CALL_START) if tag_id is None else [tag_id]
    return tag + tokenizer.encode("\n")


# ── plain completions ────────────────────────────────────────────────────────────────────────────────────────────────


def parse_completion_request(request: CompletionRequest, registry: ModelRegistry) -> list[GenerationRequest]:
    """One request for each prompt."""
    model = find_model(registry, request.model)
    max_tokens = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    requests = []
    for prompt in request.prompts:
        prompt_ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not prompt_ids:  # the beginning of a text: what a model writes after a stop token
            prompt_ids = [max(model.tokenizer.stop_ids)]
        unknown = next((i for i in prompt_ids if not model.tokenizer.has_token(i)), None)
        if unknown is not None:
            raise RequestError(400, f"the vocabulary has no token {unknown}", "prompt")
        completion = GenerationRequest(
            model=model,
            model_ref=model.ref(model.adapter),
            prompt_ids=prompt_ids,
            sampling=sampling_params(request, model, prompt_ids, max_tokens, min_tokens=1 if max_tokens else 0),
            num_samples=request.n or 1,
            top_logprobs=request.logprobs,
            prompt_logprobs=bool(request.echo) and request.logprobs is not None,
            is_plain_text=True,
        )
        requests.append(completion)
    return requests


# ── sampling and grammars ────────────────────────────────────────────────────────────────────────────────────────────


def sampling_params(
    request: CommonRequest, model: ModelInfo, prompt_ids: list[int], max_tokens: int, min_tokens: int = 1
) -> SamplingParams:
    """Raises RequestError if the context leaves fewer than `min_tokens` tokens for the completion."""
    tokens_left = model.context - len(prompt_ids)
    if tokens_left < min_tokens:
        message = f"the prompt of {len(prompt_ids)} tokens leaves no room for a reply in the context of {model.context}"
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise RequestError(400, message, param, "context_length_exceeded")
    return SamplingParams(
        max_tokens=min(max_tokens, tokens_left),
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=secrets.randbits(48) if request.seed is None else request.seed,
        stop=request.stop_texts,
    )


def selected_functions(request: ChatRequest, functions: list[Function]) -> list[Function]:
    """The functions that `tool_choice` allows."""
    if request.tool_choice == "required":
        return functions
    return [function for function in functions if function.name == request.tool_choice.function.name]


def calls_schema(functions: list[Function]) -> dict:
    """JSON schema of a call of one of these functions."""
    definitions: dict = {}
    calls = []
    for function in functions:
        parameters = dict(function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):  # references in the parameters are relative to the root of the schema
            merge_definitions(definitions, key, parameters.pop(key, {}))
        call = {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        calls.append(call)
    return definitions | {"anyOf": calls}


def merge_definitions(definitions: dict, key: str, schemas: dict) -> None:
    if not isinstance(schemas, dict):
        raise RequestError(400, f"'{key}' in a schema must be an object", "tools", "invalid_schema")
    for name, schema in schemas.items():
        if definitions.setdefault(key, {}).setdefault(name, schema) != schema:
            raise RequestError(400, f"two functions have different definitions of '{name}'", "tools")


def compile_grammar(schema: dict, param: str) -> str:
    """The grammar of a JSON schema. Raises RequestError if the schema is invalid or not supported."""
    grammar = json_grammar(schema)
    if error := grammar_error(grammar):
        first_line = error.split("\n")[0]
        message = f"this JSON schema is not supported: {first_line[:300]}"
        raise RequestError(400, message, param, "invalid_schema")
    return grammar
