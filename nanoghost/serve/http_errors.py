"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

import json
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from nanoghost.errors import UserError
from nanoghost.serve.client import EngineRejected, EngineStopped, QueueFull
from nanoghost.serve.validation_messages import explain

RETRY_SECONDS = 2  # value of the Retry-After header
RETRY_AFTER = {"retry-after": str(RETRY_SECONDS)}

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that cannot be served. The exception handler turns it into an error response."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        """Name of the field that is wrong."""
        self.code = code


class ClientDisconnected(Exception):
    """The client closed the connection; nobody reads the response."""


def json_response(content: Any, status: int = 200, headers: dict | None = None) -> Response:
    headers = {"cache-control": "no-store"} | (headers or {})
    return Response(json.dumps(content), status, headers, "application/json")


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None
) -> Response:
    error_type = "server_error" if status >= 500 else ERROR_TYPES.get(status, "invalid_request_error")
    error = {"message": message, "type": error_type, "param": param, "code": code}
    return json_response({"error": error}, status, headers)


def response_for_exception(error: Exception) -> Response:
    match error:
        case RequestError():
            return error_response(error.status, error.message, error.param, error.code)
        case QueueFull():
            message = "server is at capacity, retry later"
            return error_response(429, message, code="queue_full", headers=RETRY_AFTER)
        case EngineRejected():
            return error_response(400, str(error), headers=RETRY_AFTER)
        case EngineStopped():
            return error_response(503, str(error), code="engine_stopped", headers=RETRY_AFTER)
        case UserError():
            return error_response(400, str(error))
        case RequestValidationError():
            return validation_error_response(error)
        case HTTPException():
            return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case ClientDisconnected():
            return error_response(400, "the client closed the connection")
    return error_response(500, "internal server error; see the server log")


def validation_error_response(error: RequestValidationError) -> Response:
    """Only one error: OpenAI's form has room for one."""
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return error_response(400, "the body is not valid JSON", code="json_invalid")
    message, location = explain(errors, error.body)
    return error_response(400, message, location, "invalid_value")
