"""The routes about this server: people, tools, training runs, health, metrics, and the chat page."""

import asyncio
import json
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names
from nanoghost.serve.http_errors import RETRY_AFTER, RequestError, error_response, json_response
from nanoghost.serve.openapi import JsonObject, error_responses
from nanoghost.serve.service import ServiceDependency

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; frame-ancestors 'self'"
MAX_EVENTS = 2000  # in one response

router = APIRouter()


@router.get("/people", response_model=None, responses=error_responses())
async def people(service: ServiceDependency) -> JsonObject:
    return json_response({"data": service.registry.people()})


@router.get("/tools", response_model=None, responses=error_responses())
async def tools(service: ServiceDependency) -> JsonObject:
    entries = [{"name": tool.name, "description": tool.description} for tool in service.tools.values()]
    return json_response({"data": entries})


# ── training runs ────────────────────────────────────────────────────────────────────────────────────────────────────


@router.get("/runs", response_model=None, responses=error_responses())
async def runs() -> JsonObject:
    entries = []
    for folder in map(ModelFolder, model_names()):
        try:
            stage, is_finished = folder.card.stage, folder.is_finished
        except (UserError, OSError):  # a damaged card: `nanoghost list` says so
            continue
        has_report = (folder.path / "report.html").exists()
        entry = {"name": folder.name, "stage": stage, "finished": is_finished, "report": has_report}
        entries.append(entry)
    return json_response({"data": entries})


@router.get("/runs/{name}/report", response_class=HTMLResponse, responses=error_responses(404))
async def report(name: str) -> Response:
    path = find_run(name).path / "report.html"
    if not path.exists():
        raise RequestError(404, f"'{name}' has no report yet; `nanoghost report {name}` writes one", "name")
    headers = {"content-security-policy": REPORT_POLICY, "x-frame-options": "SAMEORIGIN"}
    return FileResponse(path, media_type="text/html", headers=headers)


@router.get("/runs/{name}/events", response_model=None, responses=error_responses(404))
async def events(name: str, after: Annotated[int, Query(ge=0, le=2**40)] = 0) -> JsonObject:
    """`after`: how many events the client has already; `next` in the response is the value for its next request."""
    lines = await asyncio.to_thread(complete_lines, find_run(name).path / "events.jsonl")
    selected = lines[after : after + MAX_EVENTS]
    return json_response({"data": [json.loads(line) for line in selected], "next": after + len(selected)})


def find_run(name: str) -> ModelFolder:
    if name not in model_names():
        raise RequestError(404, f"the run '{name}' does not exist; GET /runs lists the available runs", "name")
    return ModelFolder(name)


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file that is being written, without an incomplete last one."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


# ── health ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@router.get("/health", response_model=None, responses=error_responses())
async def health() -> JsonObject:
    return json_response({"status": "ok"})


@router.get("/ready", response_model=None, responses=error_responses(503))
async def ready(service: ServiceDependency) -> JsonObject:
    if service.ready:
        return json_response({"status": "ready"})
    message = "the server is stopping" if service.draining else "the model is being loaded"
    return error_response(503, message, headers=RETRY_AFTER)


@router.get("/metrics", response_class=PlainTextResponse, responses=error_responses())
async def metrics(service: ServiceDependency) -> Response:
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")


# ── the chat page ────────────────────────────────────────────────────────────────────────────────────────────────────


@router.get("/", include_in_schema=False)
async def page(service: ServiceDependency) -> Response:
    path = service.page / "index.html"
    if not path.exists():
        raise RequestError(404, "this server has no chat page; its API is at /v1")
    return FileResponse(path, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"})


class PageFiles(StaticFiles):
    """Static files with the Content-Security-Policy of the page."""

    def file_response(self, *arguments, **options) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["content-security-policy"] = PAGE_POLICY
        response.headers["cache-control"] = "no-cache"
        return response
