"""The routes of OpenAI's API, and /tokenize."""

import asyncio
import time

from fastapi import APIRouter, Request

from nanoghost.serve.client import QueueFull
from nanoghost.serve.http_errors import json_response
from nanoghost.serve.model_registry import ModelInfo
from nanoghost.serve.openai_responses import ChatResponse, CompletionResponse, model_entry
from nanoghost.serve.openapi import STREAM_RESPONSE, JsonObject, error_responses
from nanoghost.serve.request_parsing import find_model, parse_chat_request, parse_completion_request
from nanoghost.serve.schema import ChatRequest, CompletionRequest, TokenizeRequest
from nanoghost.serve.service import ServiceDependency
from nanoghost.serve.streaming import cancel_on_disconnect, event_stream

router = APIRouter()
COMPLETION_ERRORS = error_responses(404, 408, 413, 415, 429, 503)


@router.get("/v1/models", response_model=None, responses=error_responses())
async def models(service: ServiceDependency) -> JsonObject:
    infos = service.registry.models()
    entries = [model_entry(info, adapters_of(name, infos)) for name, info in infos.items()]
    return json_response({"object": "list", "data": entries})


@router.get("/v1/models/{name:path}", response_model=None, responses=error_responses(404))
async def model(name: str, service: ServiceDependency) -> JsonObject:
    info = find_model(service.registry, name)
    return json_response(model_entry(info, adapters_of(name, service.registry.models())))


def adapters_of(name: str, infos: dict[str, ModelInfo]) -> list[str]:
    """Names of a model's adapters, without that of the model."""
    names = [other.name for other in infos.values() if other.base == name and other.name != name]
    return [adapter.partition("@")[2] for adapter in names]


@router.post("/v1/chat/completions", response_model=None, responses=STREAM_RESPONSE | COMPLETION_ERRORS)
async def chat_completions(body: ChatRequest, request: Request, service: ServiceDependency) -> JsonObject:
    received = time.monotonic()
    service.check_accepting()
    generation = await asyncio.to_thread(parse_chat_request, body, service.registry, service.tools)
    person = service.registry.person(body.person) if body.person else None
    handle = service.engine.submit(generation.engine_request())
    last_message = body.messages[-1]
    if person and last_message.role == "user":
        text = last_message.to_chat_format()["content"]
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(service.chat_log_thread, person.log_user_message, text)
        except BaseException:  # also if the client disconnects
            handle.cancel()
            raise
    response = ChatResponse(service, body, generation, handle, received, person)
    if body.stream:
        return await event_stream(request, response.chunks())
    return json_response(await cancel_on_disconnect(request, response.complete()))


@router.post("/v1/completions", response_model=None, responses=STREAM_RESPONSE | COMPLETION_ERRORS)
async def completions(body: CompletionRequest, request: Request, service: ServiceDependency) -> JsonObject:
    received = time.monotonic()
    service.check_accepting()
    generations = await asyncio.to_thread(parse_completion_request, body, service.registry)
    handles = []
    try:
        for generation in generations:
            handles.append(service.engine.submit(generation.engine_request()))
    except QueueFull:
        for handle in handles:
            handle.cancel()
        raise
    response = CompletionResponse(service, body, generations, handles, received)
    if body.stream:
        return await event_stream(request, response.chunks())
    return json_response(await cancel_on_disconnect(request, response.complete()))


@router.post("/tokenize", response_model=None, responses=error_responses(404, 408, 413, 415))
async def tokenize(body: TokenizeRequest, service: ServiceDependency) -> JsonObject:
    tokenizer = find_model(service.registry, body.model).tokenizer
    tokens = await asyncio.to_thread(tokenizer.encode, body.content)
    return json_response({"tokens": tokens, "count": len(tokens)})
