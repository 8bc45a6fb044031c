"""What stands before the routes: who may ask, from where, how much, how slowly.

A browser on this machine runs pages of strangers, and any of them can send requests to 127.0.0.1. They are told from our own
page by what they cannot forge: the Host they asked for (DNS rebinding brings a foreign one), the Origin they come from, and a
content type that a page may only send across origins after asking, which is never granted here.
"""

import asyncio
import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from nanoghost.serve.app import error

MOST_BODY = 4_000_000  # bytes
BODY_SECONDS = 15.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"), (b"x-frame-options", b"DENY"), (b"content-security-policy", b"default-src 'none'"),
]  # fmt: skip


class Guard:
    body_seconds = BODY_SECONDS

    def __init__(self, app, metrics, key: str | None, hosts: tuple[str, ...], numbers: bool = False):
        """`hosts`: by which names this server may be asked, besides the loopback's; `numbers`: by any IP address, too.

        (No name of a stranger's ever resolves to an address that stands in the Host itself.)
        """
        self.app, self.metrics = app, metrics
        self.key = hashlib.sha256(key.encode()).digest() if key else None
        self.hosts, self.numbers = {name.lower() for name in (*LOOPBACK, *hosts)}, numbers

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = Told(send)
        headers = {
            name: value.decode("latin-1") for name, value in reversed(scope["headers"])
        }  # the first of each counts
        refusal = self.refusal(scope, headers)
        if not refusal and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            refusal, receive = await self.body(headers, receive)
        try:
            await (refusal or self.app)(scope, receive, told)
        finally:
            self.metrics.requests.labels(getattr(scope.get("route"), "path", "other"), told.status).inc()

    def refusal(self, scope, headers: dict):
        """The answer to a request that goes no further, None for the others."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = headers.get(b"host", "")
        name = hostname(host)
        if len(hosts) != 1 or not (name in self.hosts or (self.numbers and is_number(name))):
            return error(
                421,
                "this server is not asked by that name: `nanoghost serve --allow-host NAME` adds one",
                code="host_not_allowed",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return error(403, "requests from pages of other origins are not served", code="origin_not_allowed")
        if self.key and not open_to_all(scope["path"]) and not self.has_key(headers.get(b"authorization", "")):
            return error(
                401,
                "this server wants its API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return None

    def has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            hashlib.sha256(given.strip().encode("latin-1")).digest(), self.key
        )

    async def body(self, headers: dict, receive):
        """(refusal or None, what gives the whole body). It is read here, so that no route ever waits for one."""
        kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return error(
                415, "the body must be JSON, and say so: Content-Type: application/json", headers=CLOSE
            ), receive
        length = headers.get(b"content-length", "0")
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_seconds):
                while more and len(body) <= MOST_BODY and int(length) <= MOST_BODY:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return error(400, "the client left"), receive
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            return error(408, f"the body did not come within {self.body_seconds:.0f} seconds", headers=CLOSE), receive
        if more or len(body) > MOST_BODY:
            return error(413, f"a body may have {MOST_BODY:,} bytes", headers=CLOSE), receive
        whole = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again():
            return whole.pop() if whole else await receive()

        return None, again


CLOSE = {"connection": "close"}  # what is left of the body is not worth reading


class Told:
    """Passes an answer on, with headers that every answer has, and keeps its status."""

    def __init__(self, send):
        self.send, self.status = send, 0

    async def __call__(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            there = {name for name, _ in message["headers"]}
            message = message | {"headers": [*message["headers"], *(h for h in HEADERS if h[0] not in there)]}
        await self.send(message)


def hostname(host: str) -> str:
    """Of a Host header, without its port; empty where it is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "") if not set(host) & set("/@?#\\") else ""
    except ValueError:
        return ""


def is_number(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def open_to_all(path: str) -> bool:
    """What is served without a key: that the server lives, and the page, which asks for the key."""
    return path in ("/", "/health") or path.startswith("/static/")
