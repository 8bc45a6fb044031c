"""An HTTP server with the API of `nanoghost serve` and prepared replies, for the tests of the page.

The last message selects the reply (ANSWERS); any other message is echoed. All requests are recorded.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

from tests.support.page_hostile import HOSTILE

PAGE = Path(__file__).parents[2] / "nanoghost" / "serve" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
TIMINGS = {"first_token_seconds": 0.21, "tokens_per_second": 187.3, "context_used": 412, "context": 2048}
REPORT = (
    "<!doctype html><html lang=en><meta charset=utf-8><title>ghost: report</title>"
    "<style>:root{color-scheme:light dark}body{margin:0;font:17px/1.6 Palatino,P052,serif;"
    "background:light-dark(#fdfdfb,#15171b);color:light-dark(#22252b,#e6e8ee)}"
    "main{max-width:780px;margin:auto;padding:40px 22px}h1{color:rgb(74, 91, 212)}</style>"
    "<main><h1>ghost</h1><p style='letter-spacing:3px'>3.9 million parameters.</p>"
    "<script>parent.ranScript = true</script></main></html>"
)


def text(*pieces, pause=0.0):
    for piece in pieces:
        yield {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        time.sleep(pause)


def call(number, name, arguments, content, **more):
    function = {"name": name, "arguments": json.dumps(arguments)}
    tool_call = {"index": 0, "id": f"call_{number}", "type": "function", "function": function}
    yield {"choices": [{"index": 0, "delta": {"tool_calls": [tool_call]}, "finish_reason": None}]}
    time.sleep(0.05)
    yield {"choices": [], "tool_result": {"tool_call_id": f"call_{number}", **function, "content": content, **more}}


def calculator_reply():
    yield from call(1, "calculator", {"expression": "17 * 23"}, "391")
    yield from text("It is ", "**391**.")


def lookup_reply():
    passages = [
        {"n": 1, "source": "notes/garden.md", "text": "The pear tree was planted in 1974."},
        {"n": 2, "source": "notes/house.md", "text": "The roof is from 1911."},
    ]
    yield from call(1, "lookup", {"query": "pear tree"}, "1: The pear tree ...", passages=passages)
    yield from text("It was planted in 1974 [1], the house is older [2]. Not a note: [7].")


def endless_reply():
    yield from text("I begin. ")
    n = 0
    while True:
        n += 1
        yield from text(f"Word {n}. ", pause=0.05)


def failing_reply(message, code):
    yield from text("Half an ans")
    yield {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def interrupted_reply():
    yield from text("Until here")
    yield None


def long_reply():
    for n in range(400):
        yield from text(f"## Part {n}\n\nSome *words* about `{n}` and **more**.\n\n- one\n- two\n\n")


ANSWERS = {
    "tool": calculator_reply,
    "lookup": lookup_reply,
    "forever": endless_reply,
    "broken": lambda: failing_reply("something is wrong", None),
    "died": lambda: failing_reply("the engine stopped", "engine_stopped"),
    "cut": interrupted_reply,
    "long": long_reply,
    "markdown": lambda: text(
        "# Title\n\nSome **bold** text.\n\n```python\nprint(1)\n",
        "```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n> quoted\n",
    ),
    "sentences": lambda: text("The first ", "sen", "tence. The sec", "ond one is here. And the", " rest", pause=0.05),
}
ERRORS = {
    "wrong": (400, "temperature must be at most 2"),
    "restart": (503, "engine"),
    "busy": (429, "queue"),
    "crash": (500, "it broke"),
}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        path, _, query = self.path.partition("?")
        if path == "/" or path.startswith("/static/"):
            file = PAGE / ("index.html" if path == "/" else path.removeprefix("/static/"))
            if file.is_file() and file.parent == PAGE:
                return self.answer(200, file.read_bytes(), KINDS[file.suffix], {"Content-Security-Policy": POLICY})
        if path == "/empty":  # a page of the same origin with nothing in it, for tests of single modules
            return self.answer(
                200,
                b"<!doctype html><html lang=en><title>empty</title><main></main>",
                KINDS[".html"],
                {"Content-Security-Policy": POLICY},
            )
        if not self.allowed():
            return
        if path.endswith("/report"):
            policy = "default-src 'none'; style-src 'unsafe-inline'"
            return self.answer(200, self.server.report.encode(), KINDS[".html"], {"Content-Security-Policy": policy})
        if path.endswith("/events"):
            after = int(query.removeprefix("after="))
            events = self.server.events.get(path.split("/")[2], [])
            return self.json(200, {"data": events[after:], "next": len(events)})
        lists = {
            "/v1/models": self.server.models,
            "/people": self.server.people,
            "/tools": self.server.tools,
            "/runs": self.server.runs,
        }
        if path in lists:
            return self.json(200, {"object": "list", "data": lists[path]})
        self.error(404, "there is nothing here")

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path))
        if not self.allowed():
            return
        if self.path != "/v1/chat/completions":
            return self.error(404, "there is nothing here")
        body = json.loads(raw)
        self.server.bodies.append(body)
        message = body["messages"][-1]["content"]
        if message in ERRORS and not self.server.recovered:
            return self.error(*ERRORS[message])
        if message.startswith("hostile "):
            stream = text(*HOSTILE[int(message.split()[1])](self.server.address))
        elif message in self.server.answers:
            stream = self.server.answers[message]()
        else:
            stream = text("You said: ", message)
        self.stream(stream)

    def stream(self, chunks):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        ends = (
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": {"total_tokens": 412}, "timings": TIMINGS},
        )
        try:
            self.wfile.write(b": a ping\n\n")
            for chunk in chain(chunks, ends):
                if chunk is None:
                    return
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                self.wfile.flush()
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.num_aborted += 1

    def allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self.error(401, "a key is needed")
        return False

    def error(self, status, message):
        self.json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}})

    def json(self, status, value):
        self.answer(
            status, json.dumps(value).encode(), "application/json", {"Retry-After": "2"} if status in (429, 503) else {}
        )

    def answer(self, status, body, kind, headers):
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Serves on a free port until `close`."""

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        self.reset()

    def reset(self):
        self.report = REPORT
        self.key, self.recovered, self.num_aborted = None, False, 0
        self.requests, self.bodies, self.answers = [], [], dict(ANSWERS)
        model = {"object": "model", "owned_by": "nanoghost", "created": 0, "context": 2048, "parameters": 134515008}
        self.models = [
            {"id": "smollm2", "adapters": ["me"], "tools": True, "learned_tools": False, **model},
            {"id": "smollm2@me", "adapters": [], "tools": True, "learned_tools": True, **model},
            {"id": "ghost", "adapters": [], "tools": False, **model, "parameters": 3900000, "context": 1024},
        ]
        self.people = [{"name": "maya", "base": "smollm2"}, {"name": "ben", "base": None}]
        self.tools = [
            {"name": "calculator", "description": "Sums, exactly."},
            {"name": "python", "description": "Short programs, in a sandbox."},
            {"name": "lookup", "description": "Passages from your documents."},
        ]
        self.runs = [
            {"name": "ghost-new", "stage": "rl", "finished": False, "report": False},
            {"name": "ghost", "stage": "rl", "finished": True, "report": True},
            {"name": "smollm2", "stage": "adopt", "finished": True, "report": False},
        ]
        self.events = {"ghost-new": events(60)}

    def close(self):
        self.shutdown()
        self.server_close()


def events(steps: int) -> list[dict]:
    """Events of a complete pretraining and of `steps` steps of RL."""
    result = []
    for step in range(0, 340, 2):
        loss = 2.2 + 4 / (1 + step / 12) + 0.06 * ((step * 7919) % 13 - 6) / 6
        result.append(
            {
                "time": step,
                "stage": "pretrain",
                "step": step,
                "steps": 340,
                "loss": loss,
                "tokens_per_second": 41000 + (step * 31) % 900,
                "seconds_left": 1,
            }
        )
        if step % 34 == 0 and step:
            result.append(
                {"time": step, "stage": "pretrain", "step": step + 0.5, "validation_bpb": 1.9 + 1.2 / (1 + step / 30)}
            )
    for step in range(steps):
        learned = 1 - 1 / (1 + step / 20)
        result.append(
            {
                "time": 400 + step,
                "stage": "rl",
                "step": step,
                "steps": 73,
                "reward": 0.2 + 0.7 * learned + 0.04 * ((step * 31) % 7 - 3) / 3,
                "pass_rate_chain_sum": 0.48 + 0.3 * learned + 0.05 * ((step * 17) % 5 - 2) / 2,
                "pass_rate_spell_backward": min(1, 0.3 + 0.7 * learned),
                "entropy": 0.6 - 0.3 * learned,
                "tokens_per_second": 3100 + (step * 131) % 400,
                "seconds_left": 2.6 * (73 - step),
            }
        )
    return result
