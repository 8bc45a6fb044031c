"""Text from files that people have: UTF-8, UTF-16 with its mark, compressed. Errors name the file and the line."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO

from nanoghost.data.encodings import likely_encoding
from nanoghost.errors import UserError


def open_zstd(f: BinaryIO, mode: str) -> BinaryIO:
    import pyarrow  # slow to import

    return io.BufferedReader(pyarrow.input_stream(f, compression="zstd"))


COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open, b"(\xb5/\xfd": open_zstd}
"""{first bytes: function that decompresses an open file}."""

DOCUMENTS = {
    b"%PDF": "a PDF: extract its text, for example with pdftotext",
    b"PK\x03\x04": "a ZIP archive (also .docx, .odt, .epub): extract its text, for example with pandoc",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as text",
    b"{\\rtf": "an RTF document: extract its text, for example with pandoc",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"PAR1": "a parquet file: its name must end with .parquet",
    b"SQLite": "a database: write its texts into a .jsonl file",
}
"""{first bytes: what the file is, and what to do}."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before the mark of UTF-16, which has the same first bytes
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""{byte order mark: encoding}."""


@cache  # one command opens and reads a source several times
def note(text: str) -> None:
    """Print a line about the user's files to standard error, once in a process."""
    if os.environ.get("RANK", "0") == "0":
        print(UserError(text), file=sys.stderr)  # whose text has no control characters


def note_skipped(place: object, skipped: dict[str, list[str]]) -> None:
    """Say on standard error which files are skipped: {reason: names}."""
    groups = []
    for reason, names in skipped.items():
        if not names:
            continue
        groups.append(f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if groups:
        note(f"{place}: skipped {', '.join(groups)}")


def problem_of(path: Path) -> str:
    """What is wrong with a path that is not a file."""
    if path.is_dir():
        return f"{path} is a folder"
    return f"{path} is a pipe or a device, not a file" if path.exists() else f"{path} does not exist"


def read_lines(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, and UTF-16 as UTF-8. A line ends at b"\\n" only."""
    with open(file, "rb") as f:
        start = f.peek(6)
        document = next((kind for magic, kind in DOCUMENTS.items() if start.startswith(magic)), None)
        if document:
            raise UserError(f"{file} is {document}")
        opener = next((opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic)), None)
        try:
            yield from recode(opener(f, "rb") if opener else f, file)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"{file} is damaged or cut: {error}") from None


def recode(f: BinaryIO, file: Path) -> BinaryIO:
    """The file itself, or its content as UTF-8 if it starts with the mark of UTF-16 or UTF-32."""
    start = f.peek(4)
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), None)
    if encoding is None:
        return f
    try:
        text = f.read().decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} starts with the mark of {encoding}, but byte {error.start} is not {encoding}"
        ) from None
    note(f"{file}: read as {encoding}")
    return io.BytesIO(text.encode())


def read_text(file: Path) -> str:
    return normalize_line_endings(decode(b"".join(read_lines(file)), file))


def decode(raw: bytes, file: Path | str, line: int = 1, offset: int = 0) -> str:
    """Decode UTF-8 bytes that start at `line` and at byte `offset` of a file. A byte order mark is dropped.

    Zero bytes are valid UTF-8, but only binary files and UTF-16 contain them.
    """
    try:
        if b"\0" not in raw:
            return raw.decode().removeprefix("\ufeff")
        position, problem = raw.index(b"\0"), "is zero, which text does not contain; " + zero_byte_remedy(raw, offset)
    except UnicodeDecodeError as error:
        position = error.start
        problem = f"(0x{raw[position]:02x}) is not UTF-8; " + encoding_remedy(raw, position)
    line += raw.count(b"\n", 0, position)
    raise UserError(f"{file}, line {line}: byte {offset + position} {problem}")


def zero_byte_remedy(raw: bytes, offset: int) -> str:
    if 4 * raw.count(0) < len(raw):
        return "the file is binary or damaged"
    encoding = "utf-16le" if (offset + raw.index(0)) % 2 else "utf-16be"  # the zero is half of an ASCII character
    return f"if it is UTF-16 without a byte order mark, convert the file: iconv -f {encoding} -t utf-8"


def encoding_remedy(raw: bytes, position: int) -> str:
    if raw[:position].isascii():
        encoding = likely_encoding(raw[max(0, position - 1) :])  # with the letter before the first foreign one
        if not encoding:
            return "the file is binary or damaged, or in an encoding that is not recognized"
        return f"it looks like {encoding}: convert the file and look at the result: iconv -f {encoding} -t utf-8"
    return "the text before it is, so the file is cut or damaged; to leave such bytes out: iconv -c -f utf-8 -t utf-8"


def normalize_line_endings(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_unicode(text: str, where: str) -> str:
    """Return `text`. Raises UserError for half of a surrogate pair ("\\ud800"): JSON can contain it, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} is half of a surrogate pair, not text") from None
    return text
