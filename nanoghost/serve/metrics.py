"""What /metrics tells Prometheus. A registry of its own, so that two servers in one process do not mix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    def __init__(self, engine):
        self.registry = r = CollectorRegistry()
        self.requests = Counter("nanoghost_requests", "Answers by route and status", ["route", "status"], registry=r)
        self.prompt_tokens = Counter("nanoghost_prompt_tokens", "Tokens of prompts", registry=r)
        self.completion_tokens = Counter("nanoghost_completion_tokens", "Tokens written", registry=r)
        self.first_token = Histogram(
            "nanoghost_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=r
        )
        self.cancelled = Counter("nanoghost_cancelled", "Answers whose reader left", registry=r)
        self.tools = Counter("nanoghost_tool_calls", "Tools run for a model", ["tool"], registry=r)
        ProcessCollector("nanoghost_engine", lambda: engine.pid or "self", registry=r)
        ProcessCollector("nanoghost_http", registry=r)
        Gauge("nanoghost_rows", "Answers being written or waiting", registry=r).set_function(lambda: engine.rows)
        Gauge("nanoghost_engine_starts", "Times the engine process was started", registry=r).set_function(
            lambda: engine.starts
        )
        Gauge("nanoghost_ready", "Whether a model is loaded", registry=r).set_function(lambda: engine.ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)
