"""The web application of `nanoghost serve`: routes, error handlers and the description of the API."""

from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from nanoghost import __version__
from nanoghost.errors import UserError
from nanoghost.serve import openai_routes, status_routes
from nanoghost.serve.client import EngineRejected, EngineStopped, QueueFull
from nanoghost.serve.http_errors import ClientDisconnected, RequestError, response_for_exception
from nanoghost.serve.openapi import describe_api
from nanoghost.serve.service import Service

# Starlette logs a traceback for what only `Exception` matches. The others are expected, so each of them is listed.
HANDLED_EXCEPTIONS = (
    RequestError,
    QueueFull,
    EngineRejected,
    EngineStopped,
    UserError,
    RequestValidationError,
    HTTPException,
    ClientDisconnected,
    Exception,
)


async def handle_exception(request: Request, error: Exception) -> Response:
    return response_for_exception(error)


def make_app(service: Service) -> FastAPI:
    app = FastAPI(title="nanoghost", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    for exception in HANDLED_EXCEPTIONS:
        app.add_exception_handler(exception, handle_exception)
    for router in (openai_routes.router, status_routes.router):
        # Not include_router: new versions of FastAPI evaluate it lazily, so app.routes would not list all routes, and
        # the test that every route requires the key would miss some.
        app.router.routes.extend(router.routes)
    if service.page.is_dir():
        app.mount("/static", status_routes.PageFiles(directory=service.page), name="static")
    app.openapi = partial(describe_api, app, service)  # what /openapi.json returns
    return app
