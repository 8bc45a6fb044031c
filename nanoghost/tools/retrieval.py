"""Full-text search over short texts: SQLite's FTS5 index, ranked by BM25.

`TextIndex` holds texts in memory. `DocumentFolder` is a folder of text files, cut into passages, with an index on disk
that follows the folder. Words are compared by their stems ("birthdays" finds "birthday"); stop words are ignored.
"""

import hashlib
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import regex

from nanoghost.errors import UserError
from nanoghost.home import home

STOP_WORDS = set(
    "a about again an and any anything are at be been can could did do does for from give had has have he how i in is "
    "it know let me mention my of on one or please quick remember remind s said say she so some still t tell test "
    "that the their them they this to told up us user was we were what when where which who whose will with would you "
    "your".split()
)
TOKENIZER = "tokenize = 'porter unicode61 remove_diacritics 2'"

SUFFIXES = (".txt", ".md")
MAX_FILE_BYTES = 4 * 2**20
"""Longer files are ignored: they are hardly anybody's notes."""
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 60, 200
"""Length of a passage, if its section is long enough."""
SNIPPET_WORDS, MAX_SNIPPET_CHARACTERS = 40, 400
"""The part of a passage that the model reads: words around the matches, and its longest form in characters."""
MAX_QUERY_WORDS = 100


def match_expression(question: str) -> str:
    """A question as an FTS5 MATCH expression: quoted words joined by OR, so that nothing in it is FTS5 syntax."""
    words = regex.findall(r"[\p{L}\p{M}\p{N}]+", question)
    words = [word for word in words if word.casefold() not in STOP_WORDS]
    return " OR ".join(f'"{word}"' for word in words[:MAX_QUERY_WORDS])


class TextIndex:
    """An index of texts in memory."""

    def __init__(self, texts: list[str]):
        self.database = sqlite3.connect(":memory:")
        self.database.execute(f"create virtual table texts using fts5(text, {TOKENIZER})")
        self.database.executemany("insert into texts(rowid, text) values (?, ?)", enumerate(texts))

    def search(self, question: str, limit: int = 1) -> list[int]:
        """Indices of the texts that share words with the question, best first."""
        query = match_expression(question)
        if not query:
            return []
        rows = self.database.execute(
            "select rowid from texts where texts match ? order by rank, rowid limit ?", (query, limit)
        )
        return [index for (index,) in rows]


@dataclass(frozen=True)
class Passage:
    source: str
    """Path of the file, relative to the folder."""
    heading: str
    """The last heading before the passage, in files with headings."""
    text: str
    snippet: str = ""
    """The part that matches the question best, in one line."""


class FileVersion(NamedTuple):
    """A file is read again if this has changed."""

    mtime_ns: int
    size: int


class DocumentFolder:
    """A folder of .txt and .md files that is searched by passages.

    The index is in $NANOGHOST_HOME/data/documents-KEY; only its owner can read it. Each search first updates it: files
    with another time or size are read again. Hidden files, links, binary files and files of more than MAX_FILE_BYTES
    are ignored.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of documents")
        self.folder = folder.resolve()
        key = hashlib.sha256(str(self.folder).encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = home() / "data" / f"documents-{key}" / "passages-1.sqlite"  # 1: version of the tables
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with closing(self._open_updated()) as database:
            if not database.execute("select 1 from passages limit 1").fetchone():
                raise UserError(f"{folder}: it contains no text; documents are {' and '.join(SUFFIXES)} files")

    def search(self, question: str, limit: int = 3) -> list[Passage]:
        """The passages that share words with the question, best first."""
        query = match_expression(question)
        if not query:
            return []
        with closing(self._open_updated()) as database:
            rows = database.execute(
                "select source, heading, text, snippet(passages, 2, '', '', '...', ?) from passages"
                " where passages match ? order by rank, rowid limit ?",
                (SNIPPET_WORDS, query, limit),
            ).fetchall()
        passages = []
        for source, heading, text, snippet in rows:
            one_line = " ".join(snippet.split())[:MAX_SNIPPET_CHARACTERS]
            passages.append(Passage(source, heading, text, one_line))
        return passages

    def _open_updated(self) -> sqlite3.Connection:
        """The updated index. Every search has its own connection, since several threads and processes may search."""
        database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        database.execute("create table if not exists files(source primary key, time, size)")
        database.execute(f"create virtual table if not exists passages using fts5(source, heading, text, {TOKENIZER})")
        database.execute("begin immediate")  # of several searches, the first one updates and the others wait
        indexed = {}
        for source, mtime_ns, size in database.execute("select source, time, size from files"):
            indexed[source] = FileVersion(mtime_ns, size)
        present = list_documents(self.folder)
        for source, version in indexed.items():
            if version != present.get(source):
                database.execute("delete from passages where source = ?", (source,))
                database.execute("delete from files where source = ?", (source,))
        for source, version in sorted(present.items()):
            if version != indexed.get(source):
                pieces = passages_of(read_document(self.folder / source), source.lower().endswith(".md"))
                rows = [(source, heading, text) for heading, text in pieces]
                database.executemany("insert into passages(source, heading, text) values (?, ?, ?)", rows)
                database.execute("insert into files values (?, ?, ?)", (source, *version))
        database.execute("commit")
        return database


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_documents(folder: Path) -> dict[str, FileVersion]:
    """{path relative to the folder: version} of all documents. Links are not followed, wherever they lead."""
    documents = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk does not enter the others
        for name in names:
            path = Path(parent, name)
            source = path.relative_to(folder).as_posix()
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or not source.isprintable():
                continue
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
                documents[source] = FileVersion(status.st_mtime_ns, status.st_size)
    return documents


def read_document(path: Path) -> str:
    """The text of a file; empty if it is binary or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f:
            content = f.read(MAX_FILE_BYTES)
    except OSError:
        return ""
    return "" if b"\0" in content else content.decode("utf-8-sig", errors="replace")


# ── passages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def passages_of(text: str, has_headings: bool) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of the passages: paragraphs joined up to MIN_PASSAGE_WORDS, long ones cut at
    MAX_PASSAGE_WORDS.

    Every word of the text is in a passage or in its heading.
    """
    for heading, section in sections(text) if has_headings else [("", text)]:
        parts, words = [], 0
        for paragraph in paragraphs(section):
            count = len(paragraph.split())
            full = words >= MIN_PASSAGE_WORDS or words + count > MAX_PASSAGE_WORDS
            if parts and full:
                yield heading, "\n\n".join(parts)
                parts, words = [], 0
            parts.append(paragraph)
            words += count
        if parts or heading:
            yield heading, "\n\n".join(parts)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, text below it) of a Markdown text; lines in code blocks are not headings."""
    heading, lines, in_code = "", [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_code = not in_code
        title = line.lstrip("#").strip()
        if title and not in_code and re.match(r"#{1,6}\s", line):
            yield heading, "\n".join(lines)
            heading, lines = title, []
        else:
            lines.append(line)
    yield heading, "\n".join(lines)


def paragraphs(text: str) -> Iterator[str]:
    """Text between empty lines, cut after the last sentence within MAX_PASSAGE_WORDS, or else after that many words."""
    for paragraph in re.split(r"\n\s*\n", text):
        words, first = list(re.finditer(r"\S+", paragraph)), 0
        while first < len(words):
            end = min(first + MAX_PASSAGE_WORDS, len(words))
            if end < len(words):
                candidates = range(first + MIN_PASSAGE_WORDS, end)
                sentence_ends = [i + 1 for i in candidates if words[i][0][-1] in ".!?"]
                end = sentence_ends[-1] if sentence_ends else end
            yield paragraph[words[first].start() : words[end - 1].end()]
            first = end
