"""Your own text and conversations: .txt, .md, .jsonl and .parquet files, and folders of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from nanoghost.data.sources import (
    SPLITS,
    Document,
    Source,
    decode,
    fingerprint,
    folder_name,
    normalise_line_ends,
    sha256_of,
)
from nanoghost.errors import UserError
from nanoghost.home import home, read_json

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ACCEPTED = (
    "'plays', a .txt, .md, .jsonl or .parquet file, a folder of them, hub:OWNER/NAME[:CONFIG], a URL (s3://...), the name of "
    "refined data, or a mixture (plays=0.7,notes/=0.3)"
)

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
    certain = certain_splits(text for _, text in first)
    for name, text in chain(first, texts):
        yield with_split(name, text, certain)


def certain_splits(first: Iterable[str]) -> dict[float, str]:
    """Chance alone would leave 20 documents without validation one time in three: the two lowest of the first are held out
    in any case."""
    return dict(zip(sorted({position(text) for text in first}), ("test", "val")))


def with_split(name: str, text: str, certain: dict[float, str]) -> Document:
    p = position(text)
    return Document(name, text, certain.get(p) or SPLITS[(p < 2 * HELD_OUT) + (p < HELD_OUT)])


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


def open_other(spec: str) -> Source:
    """All that `--data` can name but the plays. Raises UserError for what is unknown."""
    path = Path(spec).expanduser()
    if path.exists():
        return open_local(path)
    if all(re.fullmatch(r".+=[0-9.]+", part) for part in spec.split(",")):
        from nanoghost.data.mixture import open_mixture

        return open_mixture(spec)
    if spec.startswith("hub:"):
        from nanoghost.data.hub import open_hub

        return open_hub(spec)
    if "://" in spec:
        from nanoghost.data.remote import open_remote

        return open_remote(spec)
    manifest = home() / "data" / spec / "manifest.json"
    if manifest.exists() and "kept" in read_json(manifest):
        return open_refined(manifest.parent)
    raise UserError(f"no data called '{spec}': it can be {ACCEPTED}")


def open_refined(folder: Path) -> Source:
    """What `nanoghost data refine` made, with license and attribution of what it was made of."""
    manifest = read_json(folder / "manifest.json")

    def texts():
        for name, figures in manifest["files"].items():
            if sha256_of(folder / name) != figures["sha256"]:
                raise UserError(
                    f"{folder / name} is damaged (it differs from manifest.json): remove {folder} and refine again"
                )
            yield from read_texts(name, folder / name)

    return Source(
        name=folder.name,
        license=manifest["source"]["license"],
        attribution=f"{manifest['source']['attribution']}; refined: {manifest['kept']['documents']:,} of "
        f"{manifest['read']['documents']:,} documents",
        fingerprint=fingerprint((name, bytes.fromhex(f["sha256"])) for name, f in manifest["files"].items()),
        documents=lambda skip=0: islice(split_texts(texts(), empty=f"{folder}: there is no text in it"), skip, None),
    )


def open_local(path: Path) -> Source:
    """One file or a folder of them, read in the order of their names; hidden files are skipped."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file() and kind(p) in SUFFIXES)
        files = {name: path / name for name in names if not any(part.startswith(".") for part in Path(name).parts)}
    else:
        files = {path.name: path} if kind(path) in SUFFIXES else {}
    if not files:
        raise UserError(f"{path}: no text that can be read; data can be {ACCEPTED}")

    def documents(skip: int = 0):
        texts = (document for name, file in files.items() for document in read_texts(name, file))
        return islice(split_texts(texts, empty=f"{path}: there is no text in it"), skip, None)

    return Source(
        name=folder_name(path.resolve().stem),
        license="unknown (local files)",
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


def check_unicode(text: str, where: str) -> str:
    """JSON can spell half of a surrogate pair ("\\ud800"), which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    return text


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
