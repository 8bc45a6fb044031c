"""The documents in .txt, .md, .jsonl and .parquet files."""

from collections.abc import Iterator
from pathlib import Path

from nanoghost.data.conversations import check_messages
from nanoghost.data.text_io import check_unicode, decode, normalize_line_endings, parse_json_lines
from nanoghost.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")


def read_texts(name: str, file: Path) -> Iterator[tuple[str, str]]:
    """Yield the (name, text) of each document: one for a .txt or .md file, one for each row of .jsonl and .parquet."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        for line, where, row in parse_json_lines(file):
            yield f"{name}:{line}", row_text(row, where)
    elif suffix == ".parquet":
        for number, row in enumerate(read_parquet(file), start=1):
            yield f"{name}:{number}", row_text(row, f"{file}, row {number}")
    else:
        yield name, normalize_line_endings(decode(file.read_bytes(), file))


def read_parquet(file: Path) -> Iterator[dict]:
    from pyarrow import ArrowInvalid, parquet  # slow to import, and seldom needed

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise UserError(f"{file}: not a parquet file: {str(error).splitlines()[0]}") from None
    columns = [column for column in ("text", "messages") if column in table.schema_arrow.names]
    if not columns:
        raise UserError(f"{file}: no column 'text' or 'messages'; it has {', '.join(table.schema_arrow.names)}")
    for batch in table.iter_batches(batch_size=1024, columns=columns):
        yield from batch.to_pylist()


def row_text(row, where: str) -> str:
    """The text of a row: its "text", or the contents of its "messages"."""
    if not isinstance(row, dict) or not (row.keys() & {"text", "messages"}):
        raise UserError(f"{where}: expected an object with 'text' (or 'messages')")
    if row.get("messages") is not None:
        return "\n".join(message["content"] or "" for message in check_messages(row["messages"], where))
    if not isinstance(row.get("text"), str):
        raise UserError(f"{where}: 'text' is {row.get('text')!r:.40}, not a string")
    return check_unicode(row["text"], where)
