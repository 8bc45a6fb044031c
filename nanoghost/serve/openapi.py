"""The description of the API at /openapi.json, and the error responses that each route declares for it."""

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nanoghost.home import model_names
from nanoghost.serve.service import Service

ERROR_DESCRIPTIONS = {
    400: "Invalid request",
    401: "The API key is missing or wrong",
    403: "The Host or the Origin is not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "The body was not received in time",
    413: "The body is too large",
    415: "The body is not JSON",
    421: "The Host is not a name of this server",
    429: "The server is at capacity",
    500: "Internal server error",
    503: "The server is stopping, or its engine is restarting",
}
COMMON_ERRORS = (400, 401, 403, 405, 421, 500)
REQUEST_SCHEMAS = ("ChatRequest", "CompletionRequest", "TokenizeRequest")


class JsonObject(dict):
    """Return type of routes, for the description: any JSON object."""


def error_responses(*statuses: int) -> dict:
    """The `responses` of a route: the common errors and these."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": ERROR_DESCRIPTIONS[status], "content": content}
        for status in (*COMMON_ERRORS, *statuses)
    }


STREAM_RESPONSE = {200: {"content": {"text/event-stream": {}}}}
"""For `responses` of a route that answers with events if `stream` is set, and otherwise with JSON."""


def describe_api(app: FastAPI, service: Service) -> dict:
    """FastAPI's description with our errors instead of its own, and with the names that exist at the moment."""
    description = get_openapi(title=app.title, version=app.version, routes=app.routes)
    replace_error_schema(description)
    add_current_names(description, service)
    return description


def replace_error_schema(description: dict) -> None:
    for path in description["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's status of an invalid request; here it is 400
    schemas = description["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    error = {"type": "object", "required": ["message", "type", "param", "code"]}
    schemas["Error"] = {"type": "object", "required": ["error"], "properties": {"error": error}}


def add_current_names(description: dict, service: Service) -> None:
    """Restrict models, people, tools and runs to those that exist, so that generated requests are not all 404."""
    schemas = description["components"]["schemas"]
    chat_fields = schemas["ChatRequest"]["properties"]
    chat_fields["person"] = {"enum": [None, *(person["name"] for person in service.registry.people())]}
    chat_fields["server_tools"]["anyOf"][0]["items"]["enum"] = list(service.tools)
    models = list(service.registry.models())
    if models:
        for name in REQUEST_SCHEMAS:
            schemas[name]["properties"]["model"]["enum"] = models
        for path in ("/runs/{name}/report", "/runs/{name}/events"):
            [name_parameter, *_] = description["paths"][path]["get"]["parameters"]
            name_parameter["schema"]["enum"] = model_names()
