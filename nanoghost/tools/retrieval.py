"""Full-text search over short texts: SQLite's FTS5 index, ranked by BM25.

`TextIndex` holds texts in memory. `DocumentFolder` is a folder of text files, cut into passages, with an index on disk
that follows the folder. Words are compared by their stems ("birthdays" finds "birthday"); stop words are ignored.

SQLite finds words by blanks and compares them as they are encoded. What it would miss is in a second column of the
index: the pairs of neighboring characters in scripts without blanks, and words of unusual form (text_forms.py). That
column is empty for English, so the ranking there is that of the words alone.
"""

import hashlib
import os
import re
import sqlite3
import stat
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import regex

from nanoghost.data.text_io import BYTE_ORDER_MARKS, normalize_line_endings, note_skipped
from nanoghost.errors import UserError
from nanoghost.home import home
from nanoghost.tools.text_forms import UNSPACED, fold, unusual_parts

STOP_WORDS = set(
    "a about again an and any anything are at be been can could did do does for from give had has have he how i in is "
    "it know let me mention my of on one or please quick remember remind s said say she so some still t tell test "
    "that the their them they this to told up us user was we were what when where which who whose will with would you "
    "your".split()
).union("はがのをにへともでかやねよ的了是吗呢")
TOKENIZER = "tokenize = 'porter unicode61 remove_diacritics 2'"

SUFFIXES = (".txt", ".md")
MAX_FILE_BYTES = 4 * 2**20
"""Longer files are ignored: they are hardly anybody's notes."""
MIN_PASSAGE_WORDS, MAX_PASSAGE_WORDS = 60, 200
"""Length of a passage, if its section is long enough."""
SNIPPET_WORDS, MAX_SNIPPET_CHARACTERS = 40, 400
"""The part of a passage that the model reads: words around the matches, and its longest form in characters."""
EXCERPT_CHARACTERS = 120
"""The same in scripts without blanks."""
MAX_QUERY_WORDS = 100

SENTENCE_ENDS = ".!?。！？"
MAX_WORD_CHARACTERS = 60
PIECES = regex.compile(rf"(?V1)(?:[^{UNSPACED}。！？]*+{UNSPACED}){{1,3}}[。！？]*|.+", regex.DOTALL)
"""Pieces of a longer stretch without blanks: up to three characters of scripts without blanks, or all of the rest."""


def match_expression(question: str) -> str:
    """A question as an FTS5 MATCH expression: quoted words joined by OR, so that nothing in it is FTS5 syntax."""
    words = regex.findall(r"[\p{L}\p{M}\p{N}]+", question)
    terms = [f'"{word}"' for word in words if word.casefold() not in STOP_WORDS]
    for term in unusual_terms(question, is_query=True):
        if term not in STOP_WORDS:
            is_lone_character = len(term) == 1 and encoded(term) != term
            terms.append(f'"{encoded(term)}"' + "*" * is_lone_character)  # *: or a pair that begins with it
    return " OR ".join(terms[:MAX_QUERY_WORDS])


def unusual_terms(text: str, is_query: bool = False) -> list[str]:
    """Words of unusual form, and the pairs of neighboring characters in scripts without blanks.

    The last character of a run stands alone, so that each one begins a term; in a query only if it is the only one.
    """
    terms = []
    for part, is_run in unusual_parts(text):
        count = len(part) - 1 if is_query and len(part) > 1 else len(part)
        terms += [part[i : i + 2] for i in range(count)] if is_run else [part]
    return terms


@lru_cache(maxsize=2**16)
def encoded(term: str) -> str:
    """Characters of scripts without blanks as digits: SQLite skips emoji and what its Unicode tables do not know."""
    return "".join(f"{ord(c):07}" for c in term) if regex.match(rf"(?V1){UNSPACED}", term) else term


def unusual_column(text: str) -> str:
    return " ".join(map(encoded, unusual_terms(text)))


class TextIndex:
    """An index of texts in memory."""

    def __init__(self, texts: list[str]):
        self.database = sqlite3.connect(":memory:")
        self.database.execute(f"create virtual table texts using fts5(text, unusual, {TOKENIZER})")
        rows = [(i, text, unusual_column(text)) for i, text in enumerate(texts)]
        self.database.executemany("insert into texts(rowid, text, unusual) values (?, ?, ?)", rows)

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
    are ignored; standard error names them at the start.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder of documents")
        self.folder = folder.resolve()
        key = hashlib.sha256(str(self.folder).encode(errors="surrogateescape")).hexdigest()[:12]
        self.path = home() / "data" / f"documents-{key}" / "passages-2.sqlite"  # 2: version of the tables
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _, skipped = list_documents(self.folder)
        with closing(self._open_updated()) as database:
            empty_files = database.execute("select source from files where source not in (select source from passages)")
            skipped["without text"] = [source for (source,) in empty_files]
            note_skipped(folder, skipped)
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
        terms = set(unusual_terms(question, is_query=True)) - STOP_WORDS
        for source, heading, text, snippet in rows:
            if count_terms(text, terms):
                snippet = excerpt(text, terms)
            one_line = " ".join(snippet.split())[:MAX_SNIPPET_CHARACTERS]
            passages.append(Passage(source, heading, text, one_line))
        return passages

    def _open_updated(self) -> sqlite3.Connection:
        """The updated index. Every search has its own connection, since several threads and processes may search."""
        database = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        database.execute("create table if not exists files(source primary key, time, size)")
        database.execute(
            f"create virtual table if not exists passages using fts5(source, heading, text, unusual, {TOKENIZER})"
        )
        database.execute("begin immediate")  # of several searches, the first one updates and the others wait
        indexed = {}
        for source, mtime_ns, size in database.execute("select source, time, size from files"):
            indexed[source] = FileVersion(mtime_ns, size)
        present, _ = list_documents(self.folder)
        for source, version in indexed.items():
            if version != present.get(source):
                database.execute("delete from passages where source = ?", (source,))
                database.execute("delete from files where source = ?", (source,))
        for source, version in sorted(present.items()):
            if version != indexed.get(source):
                pieces = passages_of(read_document(self.folder / source), source.lower().endswith(".md"))
                rows = [(source, *piece, unusual_column("\n".join((source, *piece)))) for piece in pieces]
                database.executemany("insert into passages values (?, ?, ?, ?)", rows)
                database.execute("insert into files values (?, ?, ?)", (source, *version))
        database.execute("commit")
        return database


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_documents(folder: Path) -> tuple[dict[str, FileVersion], dict[str, list[str]]]:
    """({path relative to the folder: version}, {reason: paths of what is skipped}). Links are not followed."""
    documents, skipped = {}, defaultdict(list)
    for parent, folders, names in os.walk(folder):
        for name in sorted([*folders, *names]):
            path = Path(parent, name)
            source = path.relative_to(folder).as_posix()
            status = path.lstat()
            if name.startswith("."):
                skipped["hidden"].append(source)
            elif stat.S_ISLNK(status.st_mode):
                skipped["behind links"].append(source)
            elif stat.S_ISDIR(status.st_mode):
                continue
            elif not (stat.S_ISREG(status.st_mode) and path.suffix.lower() in SUFFIXES and source.isprintable()):
                skipped["of other kinds"].append(source)
            elif status.st_size > MAX_FILE_BYTES:
                skipped[f"larger than {MAX_FILE_BYTES:,} bytes"].append(source)
            else:
                documents[source] = FileVersion(status.st_mtime_ns, status.st_size)
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk does not enter the others
    return documents, skipped


def read_document(path: Path) -> str:
    """The text of a file; empty if it is binary or cannot be read."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as f:
            content = f.read(MAX_FILE_BYTES)
    except OSError:
        return ""
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8-sig")
    text = content.decode(encoding, errors="replace")
    return "" if "\0" in text else normalize_line_endings(text)


# ── passages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def passages_of(text: str, has_headings: bool) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of the passages: paragraphs joined up to MIN_PASSAGE_WORDS, long ones cut at
    MAX_PASSAGE_WORDS.

    Every word of the text is in a passage or in its heading.
    """
    for heading, section in sections(text) if has_headings else [("", text)]:
        parts, words = [], 0
        for paragraph in paragraphs(section):
            count = len(word_spans(paragraph))
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
    for line in text.split("\n"):
        if line.lstrip().startswith("```"):
            in_code = not in_code
        title = " ".join(line.lstrip("#").split())
        if title and not in_code and re.match(r"#{1,6}\s", line):
            yield heading, "\n".join(lines)
            heading, lines = title, []
        else:
            lines.append(line)
    yield heading, "\n".join(lines)


def paragraphs(text: str) -> Iterator[str]:
    """Text between empty lines, cut after the last sentence within MAX_PASSAGE_WORDS, or else after that many words."""
    for paragraph in re.split(r"\n\s*\n", text):
        spans, first = word_spans(paragraph), 0
        while first < len(spans):
            last = min(first + MAX_PASSAGE_WORDS, len(spans)) - 1
            if last < len(spans) - 1:
                candidates = range(first + MIN_PASSAGE_WORDS, last + 1)
                sentence_ends = [i for i in candidates if paragraph[spans[i][1] - 1] in SENTENCE_ENDS]
                last = sentence_ends[-1] if sentence_ends else last
            yield paragraph[spans[first][0] : spans[last][1]]
            first = last + 1


def word_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each word. Three characters of a long stretch in a script without blanks count as a word."""
    spans = []
    for word in re.finditer(r"\S+", text):
        pieces = [word] if len(word[0]) <= MAX_WORD_CHARACTERS else PIECES.finditer(text, *word.span())
        spans += [piece.span() for piece in pieces]
    return spans


def excerpt(text: str, terms: set[str]) -> str:
    """The EXCERPT_CHARACTERS of a text that have most of the terms."""
    starts = range(0, len(text), EXCERPT_CHARACTERS // 2)
    return max((text[i : i + EXCERPT_CHARACTERS] for i in starts), key=lambda window: count_terms(window, terms))


def count_terms(text: str, terms: set[str]) -> int:
    folded = fold(text)
    return sum(term in folded for term in terms)
