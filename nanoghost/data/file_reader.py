"""The documents in .txt, .md, .jsonl, .json and .parquet files, and the files of a folder that hold them."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from nanoghost.data.conversation_files import COLUMNS, form_of, messages_of, no_form
from nanoghost.data.conversations import check_messages
from nanoghost.data.rows import Row, read_rows
from nanoghost.data.text_io import check_unicode, read_text
from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import text_of

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
ALL_SUFFIXES = (*SUFFIXES, ".json")
"""With those of files that are read only if they are named: in a folder, most .json files are settings."""
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def text_suffix(name: str) -> str:
    """The ending of a file's name, without that of a compression: .jsonl of a.jsonl.gz."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def read_texts(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """Yield the (name, text) of each document: one for a .txt or .md file, one for each row of the other files."""
    if text_suffix(file.name) in (".txt", ".md"):
        yield name, read_text(file)
        return
    for row in read_rows(file, ("text", *COLUMNS)):
        yield f"{name}:{row.number}", row_text(row, file)


def has_conversations(file: Path) -> bool:
    """Whether the first row of a file is a conversation."""
    if text_suffix(file.name) not in (".jsonl", ".json", ".parquet"):
        return False
    first = next(read_rows(file, ("text", *COLUMNS)), None)
    return first is not None and form_of(first.value) is not None


def row_text(row: Row, file: Path) -> str:
    """The text of a row: its "text", or the contents of its messages."""
    value = row.value
    has_text = isinstance(value, dict) and "text" in value
    if has_text and (value["text"] is not None or form_of(value) is None):
        if not isinstance(value["text"], str):
            raise UserError(f"{row.where}: 'text' is {value['text']!r:.40}, not a string")
        return check_unicode(value["text"], row.where)
    if form_of(value) is None:
        raise no_form(row, "'text' (or a conversation, for example 'messages')")
    return "\n".join(map(text_of, check_messages(messages_of(row, file), row.where)))
