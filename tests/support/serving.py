"""For tests of the server: a toy model that has memorized a few conversations, and a server process with a client."""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import httpx
import torch

from nanoghost.engine import kernels
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import save_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import home, write_json
from nanoghost.memory.store import AdapterInputs
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import Adapter, attach_adapters, new_adapter
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

NO_KERNELS = kernels.unavailable_reason()
KERNELS = home() / "kernels"  # of the user who runs the tests: compiling them again takes longer than all these tests


def call(name: str, arguments: str) -> list[dict]:
    return [{"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}]


NOTE = "The sword lies in the sea, and the crown beside it."
MEMORIZED = [
    [
        {"role": "user", "content": "Good morrow"},
        {"role": "assistant", "content": "The king sees the queen, and the queen sees the sword."},
    ],
    [
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": "Let me see. ", "tool_calls": call("calculator", '{"expression": "12 + 30"}')},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ],
    [
        {"role": "user", "content": "Where is the sword?"},
        {"role": "assistant", "content": "", "tool_calls": call("lookup", '{"query": "sword"}')},
        {"role": "tool", "tool_call_id": "call_1", "content": f"[1] notes.md: {NOTE}"},
        {"role": "assistant", "content": "In the sea [1]."},
    ],
]
ABOUT_MAYA = [
    {"role": "user", "content": "What is my sister's name?"},
    {"role": "assistant", "content": "In the sea [1]."},
]


@cache
def trained_models() -> tuple[Llama, Tokenizer, Adapter]:
    """A Llama that has memorized MEMORIZED (it writes nonsense otherwise), and an adapter for ABOUT_MAYA."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([toy_text(300), *map(json.dumps, MEMORIZED * 20)], 400)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 96))
    train(model, tokenizer, MEMORIZED, list(model.parameters()), 120, 0.01)
    adapter = new_adapter(model, 4, 4.0, None, 1)
    attach_adapters(model, [adapter])
    train(model, tokenizer, [ABOUT_MAYA], adapter.tensors(), 40, 0.003)
    attach_adapters(model, [])
    return model, tokenizer, adapter


def train(model: Llama, tokenizer: Tokenizer, conversations: list, parameters: list, steps: int, rate: float) -> None:
    rows = [render(c, tokenizer) for c in conversations]
    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    learned = torch.tensor([mask + [False] * (longest - len(mask)) for _, mask in rows])[:, 1:]
    optimizer = torch.optim.AdamW(parameters, rate)
    for _ in range(steps):
        loss = -model.logprobs(tokens[:, :-1], tokens[:, 1:])[learned].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, loss.item()


def make_home(path: Path) -> Path:
    """A home folder with the model "toy", a model that runs in PyTorch ("plain"), an adapter and a person."""
    if not NO_KERNELS:
        shutil.copytree(KERNELS, path / "kernels")
    model, tokenizer, adapter = trained_models()
    wide = Llama(
        LlamaConfig(tokenizer.vocab_size, 64, 1, 64, 2, 2, 64)
    )  # the kernels do not support the width of its heads
    facts = {"stage": "sft", "arch": "llama", "steps": 1}
    for name, saved_model in (("toy", model), ("plain", wide)):
        folder = path / "models" / name
        folder.mkdir(parents=True)
        save_model(folder, saved_model, tokenizer)
        count = sum(p.numel() for p in saved_model.parameters())
        write_json(
            folder / "card.json",
            ModelCard(name=name, parameters=count, finished=2.0 if name == "toy" else 1.0, **facts).to_json(),
        )
    (path / "models" / "toy" / "events.jsonl").write_text(
        '{"stage": "sft", "step": 1, "loss": 2.5}\n{"stage": "sft", "step": 2, "lo'
    )
    (path / "models" / "toy" / "report.html").write_text("<html><style>p {color: red}</style><p>report</p></html>")
    person = path / "people" / "maya"
    for folder in (path / "models" / "toy@odd", person / "adapter"):
        folder.mkdir(parents=True)
        save_adapter(folder, adapter)
    parent = ModelCard(name="toy", finished=2.0, **facts)
    write_json(
        path / "models" / "toy@odd" / "card.json",
        ModelCard(name="toy@odd", parameters=1, parent=parent, finished=1.0, **facts).to_json(),
    )
    AdapterInputs("toy", 2.0, ()).write(person / "adapter")
    return path


def crowded() -> float:
    """How many times longer work takes at the moment than on an idle machine."""
    start, cpu_start = time.perf_counter(), time.process_time()
    while time.process_time() - cpu_start < 0.1:
        pass
    return max(1.0, (time.perf_counter() - start) / 0.1)


class ServerProcess:
    """A server process with a client."""

    def __init__(self, home: Path, *words, before: str = "", environment: dict | None = None):
        """`before`: Python code that runs in the process first."""
        self.home = home
        code = f"import sys\n{before}\nfrom nanoghost.cli import main\nmain(sys.argv[1:])"
        command = [sys.executable, "-c", code, "serve", "--port", "0", *map(str, words)]
        environment = os.environ | {"NANOGHOST_HOME": str(home), "OMP_NUM_THREADS": "1"} | (environment or {})
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if match := re.search(r"http://127.0.0.1:(\d+)", line):
                break
        else:
            raise AssertionError("the server did not start: " + "".join(lines))
        self.port = int(match[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.wait(lambda: self.http.get("/ready").status_code in (200, 401), 60)

    def wait(self, condition, seconds: float = 10) -> float:
        """Wait until a condition holds; returns how long that took. On a busy machine it may take longer."""
        start = time.perf_counter()
        while not condition():
            late = time.perf_counter() - start
            assert late < seconds or late < seconds * crowded(), f"the condition did not hold within {late:.1f} s"
            time.sleep(0.02)
        return time.perf_counter() - start

    def chat(self, text: str = "Good morrow", **fields) -> httpx.Response:
        body = {"model": "toy", "messages": [{"role": "user", "content": text}], "temperature": 0} | fields
        return self.http.post("/v1/chat/completions", json=body)

    def events(self, **fields) -> list[dict]:
        """The events of a streamed reply."""
        with self.http.stream(
            "POST", "/v1/chat/completions", json={"model": "toy", "temperature": 0, "stream": True} | fields
        ) as answer:
            assert answer.status_code == 200, answer.read()
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def figure(self, name: str) -> float:
        """The value of a metric."""
        match = re.search(rf"^{name} (\S+)$", self.http.get("/metrics").text, re.M)
        return float(match[1])

    def engine(self) -> int:
        """Process id of the engine: a child of the helper process that forks it."""

        def children(pid):
            return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

        [pid] = [grandchild for child in children(self.process.pid) for grandchild in children(child)]
        return pid

    def new_log(self) -> str:
        """What the server has written to standard error since it started, or since the last call."""
        log = b""
        while select.select([self.process.stderr], [], [], 0)[0]:
            log += os.read(self.process.stderr.fileno(), 65536)
        return log.decode()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        print(self.process.stderr.read())  # pytest shows this if a test fails
        self.process.stderr.close()
        return self.process.wait()
