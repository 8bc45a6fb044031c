"""Rows of files: JSON values, one a line or in one list, and the rows of parquet files. Errors name file and line."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nanoghost.data.text_io import check_unicode, decode, read_lines
from nanoghost.errors import UserError

TABLES = {".csv": ",", ".tsv": "\t"}
"""{ending of a table's name: what separates its columns}."""
BLANK_OR_COMMA = re.compile(r"[\s,]*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Row(NamedTuple):
    number: int
    """The line, or the position in a list or a parquet file, counted from 1."""
    where: str
    """File and line, or file and row, for error messages."""
    value: object


def read_rows(file: Path, columns: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of a .parquet file (only these columns) or of a file of JSON. Raises UserError for a table."""
    check_is_no_table(file)
    return parquet_rows(file, columns) if file.suffix.lower() == ".parquet" else json_rows(file)


def check_is_no_table(file: Path) -> None:
    """Raise UserError for a file of comma-separated values: its columns seldom have names that mean something here."""
    separator = TABLES.get(file.suffix.lower())
    if separator is None or not file.is_file():
        return
    header = decode(next(read_lines(file), b""), file).strip()
    columns = ", ".join(map(repr, next(csv.reader([header], delimiter=separator), [])))
    raise UserError(
        f"{file} is a table (columns: {columns or 'none':.200}): write each row as a line of a .jsonl file, as"
        ' {"text": ...}, or with {"prompt": ..., "completion": ...} for conversations'
    )


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def json_rows(file: Path) -> Iterator[Row]:
    """Yield the value of each line that is not blank, or the items if the file is one list."""
    lines, offset, is_first = read_lines(file), 0, True
    for number, raw in enumerate(lines, start=1):
        text = decode(raw, file, number, offset).rstrip()
        offset += len(raw)
        if not text:
            continue
        if is_first and text.lstrip().startswith("["):
            yield from list_items(text + "\n" + decode(b"".join(lines), file, number + 1, offset), file, number)
            return
        is_first = False
        value, end = parse_json(text, len(text) - len(text.lstrip()), file, number)
        if end < len(text):
            raise not_json(file, number, f"Extra data at column {end + 1}")
        yield Row(number, f"{file}:{number}", value)


def list_items(text: str, file: Path, line: int) -> Iterator[Row]:
    """Yield the items of the list that `text` is; it starts at that line of the file."""
    number, end = 0, text.index("[") + 1
    while True:
        start = BLANK_OR_COMMA.match(text, end).end()
        line += text.count("\n", end, start)
        if text[start : start + 1] in ("", "]"):
            break
        value, end = parse_json(text, start, file, line)
        number += 1
        yield Row(number, f"{file}:{line}, item {number}", value)
        line += text.count("\n", start, end)
    if not text[start:]:
        raise UserError(f"{file}:{line}: not JSON: the list has no end, so the file may be cut")
    if text[start + 1 :].strip():
        raise UserError(f"{file}:{line}: not JSON: text after the end of the list")


class JSONError(ValueError):
    """JSON that Python reads, but that means nothing."""


def parse_json(text: str, start: int, file: Path, line: int) -> tuple[object, int]:
    """(the JSON value at that position, which is in that line of the file, the position after it)."""
    where = f"{file}:{line}"
    try:
        value, end = DECODER.raw_decode(text, start)
        if SURROGATE.search(text, start, end):
            check_unicode(json.dumps(value, ensure_ascii=False), where)
        return value, end
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise not_json(file, line, f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: too many brackets inside one another") from None
    except JSONError as error:
        raise UserError(f"{where}: {error}") from None
    except ValueError:  # the only other one: Python refuses to read so many digits
        raise UserError(f"{where}: a number has too many digits: write it as a string") from None


def not_json(file: Path, line: int, problem: str) -> UserError:
    return UserError(f"{file}:{line}: not JSON: {problem}; a file of JSON has one value a line, or is one list")


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise JSONError(f"an object has the key {key!r:.40} twice")
    return keys


def null(constant: str) -> None:
    """NaN and Infinity, which Python writes into JSON, are what JSON.stringify makes of them."""


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=null)


# ── parquet ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parquet_rows(file: Path, columns: Iterable[str]) -> Iterator[Row]:
    """Yield the rows. Columns of other names are there, but null."""
    from pyarrow import ArrowException, parquet  # slow to import, and seldom needed

    number = 0
    with open(file, "rb") as f:
        try:
            table = parquet.ParquetFile(f, page_checksum_verification=True)
            names = table.schema_arrow.names
        except (ArrowException, OSError) as error:
            raise UserError(f"{file}: not a parquet file: {first_line(error)}") from None
        present = [column for column in columns if column in names]
        if not present:
            raise UserError(f"{file}: no column that is read here ({', '.join(columns)}); it has {', '.join(names)}")
        try:
            for batch in table.iter_batches(batch_size=1024, columns=present):
                for row in batch.to_pylist():
                    number += 1
                    value = dict.fromkeys(names) | {key: without_nulls(row[key]) for key in row}
                    yield Row(number, f"{file}, row {number}", value)
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}, row {number + 1} or later: the file is damaged: {first_line(error)}") from None


def without_nulls(value):
    """Parquet gives all objects of a column the same keys; those that an object did not have are null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
