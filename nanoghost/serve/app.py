"""The routes of `nanoghost serve`: OpenAI's, and those that the page needs."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from nanoghost import __version__
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names
from nanoghost.serve import openai_responses
from nanoghost.serve.client import EngineClient, Full, Gone
from nanoghost.serve.metrics import Metrics
from nanoghost.serve.model_registry import Registry
from nanoghost.serve.request_parsing import Refused, chat_question, completion_questions, known_model
from nanoghost.serve.schema import ChatRequest, CompletionRequest, TokenizeRequest
from nanoghost.tools.registry import Tool

PAGE = Path(__file__).with_name("page")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'"
RETRY_SECONDS = 2  # what a client is told to wait when all places are taken
MOST_EVENTS = 2000  # in one answer


@dataclass
class Service:
    """What the routes share."""

    engine: EngineClient
    registry: Registry
    tools: dict[str, Tool]
    page: Path = field(default_factory=lambda: PAGE)
    draining: bool = False
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "tools"))
    """Threads for tools, which may take a while."""
    journals: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "journals"))
    """One, so that what is said is written in its order."""

    def __post_init__(self):
        self.metrics = Metrics(self.engine)

    @property
    def ready(self) -> bool:
        return self.engine.ready and not self.draining


def error(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
) -> Response:
    """An error as OpenAI's clients read it."""
    return answer({"error": error_of(status, message, param, code)}, status, headers)


def error_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code}


def answer(value: Any, status: int = 200, headers: dict | None = None) -> Response:
    return Response(json.dumps(value), status, {"cache-control": "no-store"} | (headers or {}), "application/json")


def explained(e: Exception) -> Response:
    """The answer to a request that went wrong."""
    match e:
        case Refused():
            return error(e.status, e.message, e.param, e.code)
        case Full():
            return error(
                429,
                "all places are taken: try again in a moment",
                code="queue_full",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        case Gone():
            return error(
                400 if e.refused else 503,
                str(e),
                code=None if e.refused else "engine_stopped",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        case UserError():
            return error(400, str(e))
        case RequestValidationError():
            first = e.errors()[0]
            where = ".".join(str(part) for part in first["loc"][1:] if part != "body")
            message = first["msg"].removeprefix("Value error, ")
            if first["type"] == "json_invalid":
                message, where = "the body is not JSON", ""
            return error(400, f"{where}: {message}" if where else message, where or None, first["type"])
        case HTTPException():
            return error(e.status_code, str(e.detail), headers=dict(e.headers or {}))
    return error(500, "the server made a mistake; its log says which")


class Object(dict):
    """For the description of the API: any JSON object."""


ERRORS = {
    400: "The request is not one that can be served", 401: "The API key is missing or wrong",
    403: "The Host or Origin is not allowed", 404: "There is no such thing", 405: "Not with this method",
    408: "The body took too long", 413: "The body is too large", 415: "The body is not JSON", 421: "Another host was meant",
    429: "All places are taken", 500: "A mistake of the server", 503: "The server stops, or its engine starts again",
}  # fmt: skip


def documented(*codes: int) -> dict:
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {code: {"description": ERRORS[code], "content": shape} for code in (400, 401, 403, 405, 421, 500, *codes)}


async def unless_gone(request: Request, work: Awaitable) -> Any:
    """The result of some work, which is cancelled when the client leaves."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Left
    finally:
        for one in (task, gone):
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


class Left(Exception):
    """The client has closed the connection: nobody reads an answer."""


async def stream(request: Request, events: AsyncIterator[dict]) -> Response:
    """Server-sent events. What goes wrong before the first is an answer of its own."""
    first = await unless_gone(request, anext(events))

    async def lines():
        try:
            async with contextlib.aclosing(events):
                yield line(first)
                async for event in events:
                    await asyncio.sleep(
                        0
                    )  # to whoever has left, uvicorn sends nothing and waits for nothing: only here is it noticed
                    yield line(event)
        except (Gone, UserError) as e:
            failed = explained(e)
            yield b"data: " + failed.body + b"\n\n"
        yield b"data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
    )


def line(event: dict) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="nanoghost", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    engine, registry = service.engine, service.registry
    for kind in (Refused, Full, Gone, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, lambda request, e: explained(e))
    app.add_exception_handler(Left, lambda request, e: error(400, "the client left"))

    # ── OpenAI's ──────────────────────────────────────────────────────────────────────────────────────────────────

    @app.get("/v1/models", response_model=None, responses=documented())
    async def models() -> Object:
        known = registry.models().values()
        return answer(
            {
                "object": "list",
                "data": [
                    openai_responses.model(k, [o.name.partition("@")[2] for o in known if o.base == k.name != o.name])
                    for k in known
                ],
            }
        )

    @app.post("/v1/chat/completions", response_model=None, responses=documented(404, 408, 413, 415, 429, 503))
    async def chat(body: ChatRequest, request: Request) -> Object:
        asked = time.monotonic()
        open_for_work(service)
        question = await asyncio.to_thread(chat_question, body, registry, service.tools)
        person = registry.person(body.person) if body.person else None
        running = engine.submit(question.job())
        try:
            if person and body.messages[-1].role == "user":
                await asyncio.get_running_loop().run_in_executor(
                    service.journals, person.log_user_message, body.messages[-1].plain()["content"]
                )
        except BaseException:
            running.end()
            raise
        chat = openai_responses.Chat(service, body, question, running, asked, person)
        if body.stream:
            return await stream(request, chat.chunks())
        return answer(await unless_gone(request, chat.whole()))

    @app.post("/v1/completions", response_model=None, responses=documented(404, 408, 413, 415, 429, 503))
    async def completions(body: CompletionRequest, request: Request) -> Object:
        asked = time.monotonic()
        open_for_work(service)
        questions = await asyncio.to_thread(completion_questions, body, registry)
        running = []
        try:
            for question in questions:
                running.append(engine.submit(question.job()))
        except Full:
            for one in running:
                one.end()
            raise
        completion = openai_responses.Completion(service, body, questions, running, asked)
        if body.stream:
            return await stream(request, completion.chunks())
        return answer(await unless_gone(request, completion.whole()))

    @app.post("/tokenize", response_model=None, responses=documented(404, 408, 413, 415))
    async def tokenize(body: TokenizeRequest) -> Object:
        known = known_model(registry, body.model)
        tokens = await asyncio.to_thread(lambda: known.tokenizer.encode(body.content))
        return answer({"tokens": tokens, "count": len(tokens)})

    # ── what is here ──────────────────────────────────────────────────────────────────────────────────────────────

    @app.get("/people", response_model=None, responses=documented())
    async def people() -> Object:
        return answer({"data": registry.people()})

    @app.get("/tools", response_model=None, responses=documented())
    async def tools() -> Object:
        return answer(
            {"data": [{"name": tool.name, "description": tool.description} for tool in service.tools.values()]}
        )

    @app.get("/runs", response_model=None, responses=documented())
    async def runs() -> Object:
        folders = map(ModelFolder, model_names())
        return answer({"data": [
            {"name": f.name, "stage": f.card.stage, "finished": f.finished, "report": (f.path / "report.html").exists()} for f in folders
        ]})  # fmt: skip

    def run_folder(name: str) -> ModelFolder:
        if name not in model_names():
            raise Refused(404, f"there is no run '{name}': /runs lists them", "name")
        return ModelFolder(name)

    @app.get("/runs/{name}/report", response_class=HTMLResponse, responses=documented(404))
    async def report(name: str) -> Response:
        path = run_folder(name).path / "report.html"
        if not path.exists():
            raise Refused(404, f"'{name}' has no report yet: `nanoghost report {name}` makes one", "name")
        return FileResponse(
            path,
            media_type="text/html",
            headers={"content-security-policy": REPORT_POLICY, "x-frame-options": "SAMEORIGIN"},
        )

    @app.get("/runs/{name}/events", response_model=None, responses=documented(404))
    async def events(name: str, after: Annotated[int, Query(ge=0, le=2**40)] = 0) -> Object:
        lines = await asyncio.to_thread(whole_lines, run_folder(name).path / "events.jsonl")
        some = lines[after : after + MOST_EVENTS]
        return answer({"data": [json.loads(one) for one in some], "next": after + len(some)})

    # ── how it is ─────────────────────────────────────────────────────────────────────────────────────────────────

    @app.get("/health", response_model=None, responses=documented())
    async def health() -> Object:
        return answer({"status": "ok"})

    @app.get("/ready", response_model=None, responses=documented(503))
    async def ready() -> Object:
        if service.ready:
            return answer({"status": "ready"})
        return error(
            503,
            "the server is stopping" if service.draining else "the model is being loaded",
            headers={"retry-after": str(RETRY_SECONDS)},
        )

    @app.get("/metrics", response_class=PlainTextResponse, responses=documented())
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    # ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        if not (service.page / "index.html").exists():
            raise Refused(404, "this server has no page; its API is at /v1")
        return FileResponse(
            service.page / "index.html", headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        )

    if service.page.is_dir():
        app.mount("/static", Policed(directory=service.page), name="static")

    def description() -> dict:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
        parts = found["components"]["schemas"]
        inner = {"type": "object", "required": ["message", "type", "param", "code"]}
        parts["Error"] = {"type": "object", "required": ["error"], "properties": {"error": inner}}
        for unused in ("HTTPValidationError", "ValidationError"):
            parts.pop(unused, None)
        chat = parts["ChatRequest"][
            "properties"
        ]  # names as they are now: who tries the API by its description meets more than 404
        chat["person"] = {"enum": [None, *(person["name"] for person in registry.people())]}
        chat["server_tools"]["anyOf"][0]["items"]["enum"] = list(service.tools)
        if names := list(registry.models()):
            for kind in ("ChatRequest", "CompletionRequest", "TokenizeRequest"):
                parts[kind]["properties"]["model"]["enum"] = names
            for path in ("/runs/{name}/report", "/runs/{name}/events"):
                found["paths"][path]["get"]["parameters"][0]["schema"]["enum"] = model_names()
        return found

    app.openapi = description
    return app


class Policed(StaticFiles):
    def file_response(self, *arguments, **options) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["content-security-policy"] = PAGE_POLICY
        response.headers["cache-control"] = "no-cache"
        return response


def open_for_work(service: Service) -> None:
    if service.draining:
        raise Refused(503, "the server is stopping", code="stopping")


def whole_lines(path: Path) -> list[str]:
    """Lines that are written to their end."""
    return path.read_text().split("\n")[:-1] if path.exists() else []
