"""Metrics for Prometheus at /metrics. Each server has its own registry, so two in one process do not mix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from nanoghost.serve.client import EngineClient

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds


class Metrics:
    """Counters that the server increments, and gauges that read the state of the engine's client."""

    def __init__(self, engine: EngineClient):
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "nanoghost_requests", "Responses by route and status", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter("nanoghost_prompt_tokens", "Prompt tokens", registry=registry)
        self.completion_tokens = Counter("nanoghost_completion_tokens", "Generated tokens", registry=registry)
        self.first_token = Histogram(
            "nanoghost_first_token_seconds",
            "Time from a request to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.cancelled = Counter(
            "nanoghost_cancelled", "Requests that ended early: the client disconnected, or an error", registry=registry
        )
        self.tool_calls = Counter("nanoghost_tool_calls", "Tool calls that the server ran", ["tool"], registry=registry)
        # CPU time and memory of both processes, from /proc/PID ("self" is this process).
        ProcessCollector("nanoghost_engine", lambda: engine.pid or "self", registry=registry)
        ProcessCollector("nanoghost_http", registry=registry)
        sequences = Gauge("nanoghost_sequences", "Sequences that are running or waiting", registry=registry)
        sequences.set_function(lambda: engine.num_sequences)
        starts = Gauge("nanoghost_engine_starts", "How often the engine process was started", registry=registry)
        starts.set_function(lambda: engine.num_starts)
        ready = Gauge("nanoghost_ready", "Whether the default model is loaded", registry=registry)
        ready.set_function(lambda: engine.ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)
