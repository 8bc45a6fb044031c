"""Where things live: the home folder, model folders, their cards, event logs and checkpoints.

A model is a folder under `$NANOGHOST_HOME/models/NAME/` (an adapter's name is BASE@NAME, and it needs BASE beside it):

    config.json, model.safetensors, tokenizer.json ...   what other programs read
    card.json        how it was made (written when the stage starts, completed when it ends)
    events.jsonl     append-only figures; a child begins with its parent's, so one folder tells the whole story
    state/           optimizer masters and moments for an exact resume; removed when the stage is finished
"""

import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from nanoghost.errors import UserError

FORMAT = 1


def home() -> Path:
    return Path(os.environ.get("NANOGHOST_HOME") or Path.home() / ".nanoghost")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write to a temporary name, flush to disk, rename: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with replacing(temporary, path), open(temporary, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def replacing(temporary: Path, path: Path):
    """Rename `temporary` to `path` if the body succeeds; otherwise (disk full, Ctrl-C) remove it."""
    try:
        yield
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError as e:  # not JSON, not even text
        raise UserError(f"{path} is damaged: {e}") from None


def append_line(path: Path, value) -> None:
    """Append one JSON line. A line torn by a crash is cut off first, so that there stays one value to a line."""
    with open(path, "ab+") as f:
        end = f.seek(0, os.SEEK_END)
        if end and (f.seek(end - 1), f.read(1))[1] != b"\n":
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> list:
    """All values of a file of JSON lines, none if there is no such file; a torn last line is dropped."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def read_events(path: Path) -> list[dict]:
    """All events of a folder. After a resume, the last event for a (stage, step) counts; a torn last line is dropped."""
    events = read_lines(path)
    latest = {(e["stage"], e["step"]): i for i, e in enumerate(events)}
    return [e for i, e in enumerate(events) if latest[e["stage"], e["step"]] == i]


class ModelFolder:
    """A model folder by name. Names are names, never paths."""

    def __init__(self, name: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?", name):
            raise UserError(f"'{name}' is not a model name: use letters, digits, '.', '_' and '-'")
        self.name = name
        self.base = name.partition("@")[0]
        self.path = home() / "models" / name

    @property
    def card(self) -> dict:
        return read_json(self.path / "card.json")

    @property
    def exists(self) -> bool:
        return (self.path / "card.json").exists()

    @property
    def finished(self) -> bool:
        return self.exists and "finished" in self.card

    @property
    def events(self) -> list[dict]:
        return read_events(self.path / "events.jsonl")

    def append_event(self, event: dict) -> dict:
        event = {"time": round(time.time(), 3)} | event
        append_line(self.path / "events.jsonl", event)
        return event

    def write_card(self, card: dict) -> None:
        write_json(self.path / "card.json", {"format": FORMAT, "name": self.name} | card)


def model_names() -> list[str]:
    """Names of all model folders, the one finished last first; unfinished ones at the end."""
    folders = [p.parent for p in (home() / "models").glob("*/card.json")]
    done = {p.name: read_json(p / "card.json").get("finished", 0) for p in folders}
    return sorted(done, key=lambda name: -done[name])


def open_model(name: str | None) -> ModelFolder:
    """The finished model of that name, or the one finished last."""
    names = [n for n in model_names() if ModelFolder(n).finished]
    if name is None:
        if not names:
            raise UserError("there is no model yet: `nanoghost speedrun` makes one")
        return ModelFolder(names[0])
    folder = ModelFolder(name)
    if not folder.finished:
        state = "is not finished (the command that started it goes on with it)" if folder.exists else "is unknown"
        raise UserError(f"model '{name}' {state}; finished models: {', '.join(names) or 'none'}")
    return folder


@contextmanager
def writing(folder):
    """Hold the lock of a model's or a person's folder: one writer at a time; the lock goes with the process, however it ends."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with open(folder.path / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing '{folder.name}'") from None
        yield


class Stopped(KeyboardInterrupt):
    """Stopped because that was asked for, with everything saved: the program ends with 0."""


class Stopping:
    """True once SIGINT or SIGTERM has arrived: loops finish their step, save, and return."""

    def __init__(self):
        self.requested = False

    def __bool__(self):
        return self.requested

    def check(self) -> None:
        """For what has no steps of its own: stop here, if that was asked for."""
        if self.requested:
            raise Stopped

    def __enter__(self):
        def request(signum, frame):
            if self.requested:  # the second Ctrl-C does not wait
                raise KeyboardInterrupt
            self.requested = True
            print("\nstopping after this step ...", file=sys.stderr)

        self.previous = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for s, handler in self.previous.items():
            signal.signal(s, handler)
