"""Lookup: which of many short texts have to do with a question. SQLite's full-text index, ranked by BM25.

`Index` holds texts in memory; `Documents` is a folder of somebody's notes, in passages, with an index that is kept and brought
up to date. Words are compared by their stems ("birthdays" finds "birthday"); words that every question has count for nothing.
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

import regex

from nanoghost.errors import UserError
from nanoghost.home import home

COMMON = set(
    "a again an and any anything are about at be been can could did do does for from give had has have how i in is it know let"
    " me mention my of on one or please quick remember remind said say she he so some still t s tell test that the their them"
    " they this to told up user us was we were what when where which who whose will with would you your".split()
)
STEMS = "tokenize = 'porter unicode61 remove_diacritics 2'"

SUFFIXES = (".txt", ".md")
MOST_BYTES = 4 * 2**20
"""Of a file; a longer one is hardly anybody's notes."""
LEAST_WORDS, MOST_WORDS = 60, 200
"""Of a passage, where its section has as many."""
SHOWN_WORDS, SHOWN = 40, 400
"""Words of a passage, around those that were found, and characters of them: what a model reads of it."""


def match(question: str) -> str:
    """A question as SQLite's MATCH reads it: its words in quotation marks, any of them, so that nothing in it is syntax."""
    words = [word for word in regex.findall(r"[\p{L}\p{M}\p{N}]+", question) if word.casefold() not in COMMON]
    return " OR ".join(f'"{word}"' for word in words[:100])


class Index:
    def __init__(self, texts: list[str]):
        self.database = sqlite3.connect(":memory:")
        self.database.execute(f"create virtual table texts using fts5(text, {STEMS})")
        self.database.executemany("insert into texts(rowid, text) values (?, ?)", enumerate(texts))

    def search(self, question: str, most: int = 1) -> list[int]:
        """Numbers of the texts that share words with the question, best first; none if none does."""
        if not (query := match(question)):
            return []
        rows = self.database.execute(
            "select rowid from texts where texts match ? order by rank, rowid limit ?", (query, most)
        )
        return [number for (number,) in rows]


@dataclass(frozen=True)
class Passage:
    source: str
    """The file, from the folder on."""
    heading: str
    """The last heading before it, if its file has headings."""
    text: str
    shown: str = ""
    """The part of it that has most to do with the question, in one line."""


class Documents:
    """A folder of .txt and .md files, searched by passages.

    The index stands in $NANOGHOST_HOME/data/documents-KEY, and only its owner can read it. Before each search it is brought up to
    date with the folder: files of another time or size are read again. Hidden files, links, binaries and files of more than
    MOST_BYTES are left out.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of documents")
        self.folder = folder.resolve()
        key = hashlib.sha256(str(self.folder).encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = home() / "data" / f"documents-{key}" / "passages-1.sqlite"
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with closing(self._open()) as database:
            if not database.execute("select 1 from passages limit 1").fetchone():
                raise UserError(
                    f"{folder}: there is no text to look anything up in; documents are {' and '.join(SUFFIXES)} files"
                )

    def search(self, question: str, most: int = 3) -> list[Passage]:
        """The passages that share words with the question, best first; none if none does."""
        if not (query := match(question)):
            return []
        with closing(self._open()) as database:
            rows = database.execute(
                "select source, heading, text, snippet(passages, 2, '', '', '...', ?) from passages"
                " where passages match ? order by rank, rowid limit ?",
                (SHOWN_WORDS, query, most),
            ).fetchall()
        return [
            Passage(source, heading, text, " ".join(shown.split())[:SHOWN]) for source, heading, text, shown in rows
        ]

    def _open(self) -> sqlite3.Connection:
        """The index, up to date. A connection serves one search: searches may come from several threads and processes."""
        database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        database.execute("create table if not exists files(source primary key, time, size)")
        database.execute(f"create virtual table if not exists passages using fts5(source, heading, text, {STEMS})")
        database.execute("begin immediate")  # who comes second finds what the first one read
        known = {
            source: (time, size) for source, time, size in database.execute("select source, time, size from files")
        }
        found = files_of(self.folder)
        for source in [source for source in known if known[source] != found.get(source)]:
            database.execute("delete from passages where source = ?", (source,))
            database.execute("delete from files where source = ?", (source,))
        for source in sorted(found):
            if known.get(source) != found[source]:
                pieces = passages_of(text_of(self.folder / source), source.lower().endswith(".md"))
                rows = [(source, heading, text) for heading, text in pieces]
                database.executemany("insert into passages(source, heading, text) values (?, ?, ?)", rows)
                database.execute("insert into files values (?, ?, ?)", (source, *found[source]))
        database.execute("commit")
        return database


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """(time, size) of each file of documents, by its path from the folder on. Links are not followed, wherever they lead."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            source = path.relative_to(folder).as_posix()
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or not source.isprintable():
                continue
            about = path.lstat()
            if stat.S_ISREG(about.st_mode) and about.st_size <= MOST_BYTES:
                found[source] = (about.st_mtime_ns, about.st_size)
    return found


def text_of(path: Path) -> str:
    """What stands in a file; nothing in a binary one, or one that we may not read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f:
            content = f.read(MOST_BYTES)
    except OSError:
        return ""
    return "" if b"\0" in content else content.decode("utf-8-sig", errors="replace")


def passages_of(text: str, has_headings: bool) -> Iterator[tuple[str, str]]:
    """(heading, text) of passages, in order: paragraphs together up to LEAST_WORDS, long ones cut at MOST_WORDS.

    Every word of the text is in a passage or in its heading.
    """
    for heading, section in sections(text) if has_headings else [("", text)]:
        pieces, words = [], 0
        for paragraph in paragraphs(section):
            count = len(paragraph.split())
            if pieces and (words >= LEAST_WORDS or words + count > MOST_WORDS):
                yield heading, "\n\n".join(pieces)
                pieces, words = [], 0
            pieces.append(paragraph)
            words += count
        if pieces or heading:
            yield heading, "\n\n".join(pieces)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(heading, what follows it) of a Markdown text; a line in a block of code is no heading."""
    heading, lines, in_code = "", [], False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        title = line.lstrip("#").strip()
        if title and not in_code and re.match(r"#{1,6}\s", line):
            yield heading, "\n".join(lines)
            heading, lines = title, []
        else:
            lines.append(line)
    yield heading, "\n".join(lines)


def paragraphs(text: str) -> Iterator[str]:
    """What stands between empty lines, cut after the last sentence within MOST_WORDS, or after as many words."""
    for paragraph in re.split(r"\n\s*\n", text):
        words, first = list(re.finditer(r"\S+", paragraph)), 0
        while first < len(words):
            end = min(first + MOST_WORDS, len(words))
            if end < len(words):
                sentences = [i + 1 for i in range(first + LEAST_WORDS, end) if words[i][0][-1] in ".!?"]
                end = sentences[-1] if sentences else end
            yield paragraph[words[first].start() : words[end - 1].end()]
            first = end
