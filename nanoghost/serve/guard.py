"""Checks before the routes: host, origin, API key, and the size and speed of the body.

A browser on this computer also runs pages of other sites, and each of them can send requests to 127.0.0.1. The guard
tells them from our own page by what a page cannot forge: the Host header (DNS rebinding brings another one), the Origin
header, and a content type that a page may send to another origin only after a CORS preflight, which is never granted.
"""

import asyncio
import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from fastapi.responses import Response

from nanoghost.serve.http_errors import error_response
from nanoghost.serve.metrics import Metrics

MAX_BODY = 4_000_000  # bytes
BODY_TIMEOUT = 15.0  # seconds
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'"),
]
CLOSE = {"connection": "close"}  # header of responses to requests whose body is not read to the end


class Guard:
    """ASGI middleware: rejects a request, or passes it to the application with its body complete."""

    body_timeout = BODY_TIMEOUT

    def __init__(
        self, app, metrics: Metrics, key: str | None, hosts: tuple[str, ...], allow_ip_addresses: bool = False
    ):
        """`hosts`: names of this server besides those of the loopback.

        `allow_ip_addresses` also accepts any IP address as the Host. That is safe: DNS rebinding needs a name.
        """
        self.app = app
        self.metrics = metrics
        self.key_hash = sha256(key) if key else None
        self.hosts = {name.lower() for name in (*LOOPBACK_NAMES, *hosts)}
        self.allow_ip_addresses = allow_ip_addresses

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sender = HeaderSender(send)
        headers = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value.decode("latin-1"))  # the first of each name counts
        rejection = self.check_headers(scope, headers)
        if not rejection and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            rejection, receive = await self.read_body(headers, receive)
        app = rejection or self.app  # a response is an ASGI application, too
        try:
            await app(scope, receive, sender)
        finally:
            route = scope["route"].path if "route" in scope else "other"  # the router adds it
            self.metrics.requests.labels(route, sender.status).inc()

    def check_headers(self, scope, headers: dict) -> Response | None:
        """The error response for a request that is rejected; None for one that may pass."""
        num_hosts = sum(name == b"host" for name, _ in scope["headers"])
        host = headers.get(b"host", "")
        if num_hosts != 1 or not self.is_allowed_host(hostname(host)):
            message = "this host name is not allowed; `nanoghost serve --allow-host NAME` adds one"
            return error_response(421, message, code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return error_response(
                403, "requests from pages of other origins are not allowed", code="origin_not_allowed"
            )
        if self.key_hash and not is_public(scope["path"]) and not self.has_key(headers.get(b"authorization", "")):
            message = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return None

    def is_allowed_host(self, name: str) -> bool:
        return name in self.hosts or (self.allow_ip_addresses and is_ip_address(name))

    def has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(sha256(key.strip()), self.key_hash)

    async def read_body(self, headers: dict, receive):
        """(error response or None, ASGI receive function with the whole body). No route ever waits for a body."""
        content_type = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            message = "the body must be JSON with the header Content-Type: application/json"
            return error_response(415, message, headers=CLOSE), receive
        if int(headers.get(b"content-length", "0")) > MAX_BODY:  # uvicorn has checked that it is a number
            return body_too_large(), receive
        body = bytearray()
        complete = False
        try:
            async with asyncio.timeout(self.body_timeout):
                while not complete and len(body) <= MAX_BODY:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return error_response(400, "the client closed the connection"), receive
                    body += message.get("body", b"")
                    complete = not message.get("more_body", False)
        except TimeoutError:
            message = f"the body was not received within {self.body_timeout:.0f} seconds"
            return error_response(408, message, headers=CLOSE), receive
        if len(body) > MAX_BODY:
            return body_too_large(), receive
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again():  # once the body; a later call waits until the client disconnects
            return messages.pop() if messages else await receive()

        return None, receive_again


class HeaderSender:
    """ASGI send function that adds the security headers and records the status."""

    def __init__(self, send):
        self.send = send
        self.status = 0

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            names = {name for name, _ in message["headers"]}
            missing = [header for header in SECURITY_HEADERS if header[0] not in names]
            message = message | {"headers": [*message["headers"], *missing]}
        await self.send(message)


def body_too_large() -> Response:
    return error_response(413, f"the body is larger than {MAX_BODY:,} bytes", headers=CLOSE)


def sha256(key: str) -> bytes:
    """Keys are compared by their hashes: these have the same length, so the time of a comparison says nothing."""
    return hashlib.sha256(key.encode("latin-1")).digest()


def hostname(host: str) -> str:
    """The name or address in a Host header, without the port; empty if the header is invalid."""
    if set(host) & set("/@?#\\"):
        return ""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_ip_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(path: str) -> bool:
    """Whether a path is served without the key: the health check and the page, which asks for the key."""
    return path in ("/", "/health") or path.startswith("/static/")
