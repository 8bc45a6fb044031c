"""The home folder: model folders and their event logs, file locks, atomic writes.

A model is a folder under `$NANOGHOST_HOME/models/NAME/` (an adapter is called BASE@NAME and needs the folder BASE):

    config.json, model.safetensors, tokenizer.json ...   the model, in the format of Hugging Face transformers
    card.json        how the model was made (written when the stage starts, completed when it ends)
    events.jsonl     append-only log of figures; begins with a copy of the log of the parent
    state/           checkpoints for an exact resume; removed when the stage is finished
"""

import fcntl
import hashlib
import json
import os
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard

MODEL_FILE_SUFFIXES = (".safetensors", ".gguf", ".json")
LAST_TIME = 1e11
"""Unix time that no model can have been finished after: the year 5138."""


def home() -> Path:
    """The folder of models, data and people: $NANOGHOST_HOME, or ~/.nanoghost."""
    return Path(os.environ.get("NANOGHOST_HOME") or Path.home() / ".nanoghost")


def line_history() -> Path:
    """File of the lines typed into chats without a person."""
    return home() / "chat_history"


# -- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write to a temporary name, flush to disk, rename: a crash leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.tmp")  # short: names have 255 bytes
    with rename_on_success(temporary, path), open(temporary, "wb") as f:
        f.write(content.encode() if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())


@contextmanager
def rename_on_success(temporary: Path, path: Path):
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
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:  # not JSON, or not even text
        raise UserError(f"{path} is damaged: {e}") from None


def append_json_line(path: Path, value) -> None:
    """Append one line of JSON. If a crash left an incomplete last line, remove that one first."""
    with open(path, "ab+") as f:
        size = f.seek(0, os.SEEK_END)
        if size:
            f.seek(size - 1)
            if f.read(1) != b"\n":
                f.seek(0)
                f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json_line(value))


def json_line(value) -> bytes:
    """A line of a file of JSON lines. Half of a surrogate pair, which UTF-8 does not have, becomes "?"."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n"


def read_json_lines(path: Path) -> list:
    """All values of a file of JSON lines; none if the file does not exist. An incomplete last line is ignored.

    Lines end with "\\n" only: texts may contain U+2028 and other characters that `str.splitlines` takes for ends.
    """
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}, line {number} is damaged: {e}; correct or delete this line") from None
    return values


def cached_sha256(file: Path) -> str:
    """SHA-256 (hex) of a large file, computed again only if its size, time of modification or inode has changed."""
    stat = file.stat()
    version = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    cache_file = home() / "data" / "sha256.json"
    cache = read_json(cache_file) if cache_file.exists() else {}
    *cached_version, digest = cache.get(str(file)) or [""]
    if cached_version == version:
        return digest
    with open(file, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    existing = {path: entry for path, entry in cache.items() if os.path.exists(path)}
    write_json(cache_file, existing | {str(file): [*version, digest]})
    return digest


@contextmanager
def exclusive_lock(path: Path, error_if_locked: str | None = None):
    """Hold a file lock on `path`, an existing folder or a file that is created if needed.

    Waits until the lock is free, or raises UserError(error_if_locked) if that is given. The system releases the lock
    when the process and the children that inherited the descriptor have ended, however they end.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if error_if_locked else 0))
        except BlockingIOError:
            raise UserError(error_if_locked) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def write_lock(folder):
    """Lock the folder of a model or a person for writing. Raises UserError if another process holds the lock."""
    folder.path.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.path / ".lock", f"another process is writing '{folder.name}'"):
        yield


# -- models -----------------------------------------------------------------------------------------------------------


class ModelFolder:
    """A model folder, addressed by its name, which is never a path.

    `card` and `events` read their file at each access: another process may write it.
    """

    def __init__(self, name: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[A-Za-z0-9][A-Za-z0-9._-]{0,63})?", name):
            raise UserError(
                f"'{name}' is not a model name: use letters from a to z, digits, '.', '_' and '-', a letter or digit"
                " first, at most 64 characters"
            )
        self.name = name
        self.base = name.partition("@")[0]
        self.path = home() / "models" / name

    @property
    def card(self) -> ModelCard:
        return read_card(self.path)

    @property
    def exists(self) -> bool:
        return (self.path / "card.json").exists()

    @property
    def is_finished(self) -> bool:
        return self.exists and bool(finish_time(self.path / "card.json"))

    @property
    def events(self) -> list[dict]:
        return read_events(self.path / "events.jsonl")

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of weights, configuration and tokenizer; of an adapter with those of its base."""
        folders = dict.fromkeys([home() / "models" / self.base, self.path])
        files = [file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in MODEL_FILE_SUFFIXES]
        digests = [(file.name, cached_sha256(file)) for file in files if file.name != "card.json"]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def append_event(self, event: dict) -> dict:
        event = {"time": round(time.time(), 3)} | event
        append_json_line(self.path / "events.jsonl", event)
        return event

    def write_card(self, card: ModelCard) -> None:
        write_json(self.path / "card.json", card.to_json())


def read_card(folder: Path) -> ModelCard:
    return ModelCard.from_json(read_card_values(folder / "card.json"))


def read_card_values(card_file: Path) -> dict:
    """The values of a card of any format. Raises UserError if it is not an object, or `finished` is not a time."""
    values = read_json(card_file)
    if not isinstance(values, dict):
        raise UserError(f"{card_file} is damaged: it is not an object")
    finished = values.get("finished") or 0.0
    if type(finished) not in (int, float) or not 0 <= finished <= LAST_TIME:
        raise UserError(f"{card_file} is damaged: 'finished' is {finished!r:.40}")
    return values


def finish_time(card_file: Path) -> float:
    """Unix time when a model was finished, or 0.

    Reads cards of any format, so that `nanoghost rm` works on older folders.
    """
    return read_card_values(card_file).get("finished") or 0.0


def read_events(path: Path) -> list[dict]:
    """All events of a folder. After a resume the last event for a (stage, step) counts."""
    latest: dict[tuple, dict] = {}
    for event in read_json_lines(path):
        key = event["stage"], event["step"]
        latest.pop(key, None)  # the order of the result is that of the last occurrences
        latest[key] = event
    return list(latest.values())


def model_names() -> list[str]:
    """Names of all model folders: the one finished last comes first, unfinished and damaged ones come last."""
    finished = finish_times()
    return sorted(finished, key=lambda name: -finished[name])


def finish_times() -> dict[str, float]:
    """{name: Unix time when the model was finished}; 0 for unfinished models and those whose card is damaged."""
    times = {}
    for card_file in (home() / "models").glob("*/card.json"):
        try:
            times[card_file.parent.name] = finish_time(card_file)
        except (UserError, OSError):
            times[card_file.parent.name] = 0.0
    return times


def open_model(name: str | None) -> ModelFolder:
    """The finished model of that name; with None, the one finished last."""
    finished = finish_times()
    names = [n for n in model_names() if finished[n]]
    if name is None:
        if not names:
            raise UserError("there is no model yet: `nanoghost speedrun` makes one")
        return ModelFolder(names[0])
    folder = ModelFolder(name)
    if not folder.is_finished:
        problem = "is not finished (rerun its command to resume)" if folder.exists else "does not exist"
        raise UserError(f"model '{name}' {problem}; finished models: {', '.join(names) or 'none'}")
    return folder
