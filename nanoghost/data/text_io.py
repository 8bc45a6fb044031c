"""UTF-8 text and JSON lines from files. Errors name the file and the line."""

import json
from collections.abc import Iterator
from pathlib import Path

from nanoghost.errors import UserError


def decode(raw: bytes, file: Path | str, line: int = 1, offset: int = 0) -> str:
    """Decode UTF-8 bytes that start at `line` and at byte `offset` of a file. A byte order mark is dropped."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}, line {line}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, for example: iconv -f latin1 -t utf-8"
        ) from None


def normalize_line_endings(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json_lines(file: Path) -> Iterator[tuple[int, str, object]]:
    """Yield (line number, "file:line" for error messages, value) for each line that is not blank."""
    offset = 0
    with open(file, "rb") as f:
        for line, raw in enumerate(f, start=1):
            text = decode(raw, file, line, offset)
            offset += len(raw)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{line}: not JSON: {error.msg} at column {error.colno}") from None
            yield line, f"{file}:{line}", value


def check_unicode(text: str, where: str) -> str:
    """Return `text`. Raises UserError for half of a surrogate pair ("\\ud800"): JSON can contain it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    return text
