"""The state that all routes of the server share: the engine, the models, the tools, the metrics and the threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from nanoghost.serve.client import EngineClient
from nanoghost.serve.http_errors import RequestError
from nanoghost.serve.metrics import Metrics
from nanoghost.serve.model_registry import ModelRegistry
from nanoghost.tools.base import Tool

PAGE = Path(__file__).with_name("page")
TOOL_THREADS = 4  # tool calls that run at the same time


@dataclass
class Service:
    engine: EngineClient
    registry: ModelRegistry
    tools: dict[str, Tool]
    page: Path = field(default_factory=lambda: PAGE)
    """Folder of the chat page."""
    draining: bool = False
    """The server is stopping: it completes open requests and accepts no new ones."""
    tool_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TOOL_THREADS, "tools"))
    chat_log_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "chat-log"))
    """A single thread, so that messages are logged in their order."""

    def __post_init__(self):
        self.metrics = Metrics(self.engine)

    @property
    def ready(self) -> bool:
        return self.engine.ready and not self.draining

    def check_accepting(self) -> None:
        """Raises RequestError if the server is stopping."""
        if self.draining:
            raise RequestError(503, "the server is stopping", code="stopping")


async def service_of_app(request: Request) -> Service:
    return request.app.state.service


ServiceDependency = Annotated[Service, Depends(service_of_app)]
