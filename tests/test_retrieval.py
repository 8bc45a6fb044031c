"""Search in a folder of documents: results, ignored files, and an index that follows the folder."""

import os
import re
import stat
import string
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.errors import UserError
from nanoghost.tools.retrieval import (
    MAX_FILE_BYTES,
    MAX_PASSAGE_WORDS,
    MAX_SNIPPET_CHARACTERS,
    MIN_PASSAGE_WORDS,
    STOP_WORDS,
    DocumentFolder,
    TextIndex,
    passages_of,
)

WORD = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=8)
LINE = st.one_of(
    st.just(""),
    st.just("```"),
    st.text(max_size=60),
    st.lists(WORD, max_size=80).map(" ".join),
    WORD.map("# {}".format),
)
TEXT = st.lists(LINE, max_size=30).map("\n".join)


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "garden").mkdir(parents=True)
    (folder / "garden" / "bees.md").write_text(
        "# Bees\n\nThe queen lives in the blue hive.\n\n# Honey\n\nHarvested in July.\n"
    )
    (folder / "tea.txt").write_text("Tea is best when the water is not quite boiling.")
    return folder


def sources(documents: DocumentFolder, question: str) -> list[str]:
    return [passage.source for passage in documents.search(question, 10)]


def test_passages_are_found_by_text_heading_and_path(notes):
    documents = DocumentFolder(notes)
    [passage] = documents.search("Where does the QUEEN live?")
    assert (passage.source, passage.heading, passage.text) == (
        "garden/bees.md",
        "Bees",
        "The queen lives in the blue hive.",
    )
    assert documents.search("harvests")[0].heading == "Honey", "words are compared by their stems"
    assert sources(documents, "garden") == ["garden/bees.md"] * 2, "folders' and files' names count"
    assert documents.search("what is it?") == documents.search("") == documents.search("zebra") == []


@given(TEXT, st.booleans())
@settings(max_examples=100, deadline=None)
def test_passages_contain_every_word_once_and_are_short(text, has_headings):
    results = list(passages_of(text, has_headings))
    if not has_headings:
        assert " ".join(passage for _, passage in results).split() == text.split()
    words = re.findall(r"\w+", text)
    assert not set(words) - set(re.findall(r"\w+", " ".join(h + " " + p for h, p in results)))
    assert all(len(passage.split()) <= MAX_PASSAGE_WORDS for _, passage in results)
    for (heading, passage), (next_heading, following) in zip(results, results[1:]):
        if heading == next_heading == "":
            assert (
                len(passage.split()) >= MIN_PASSAGE_WORDS
                or len(passage.split() + following.split()) > MAX_PASSAGE_WORDS
            )


def test_long_paragraphs_end_with_a_sentence():
    text = " ".join(f"This is the sentence number {i} of them all." for i in range(100))
    pieces = [passage for _, passage in passages_of(text, False)]
    assert len(pieces) > 3
    assert all(piece.endswith("all.") for piece in pieces)


@given(st.lists(st.lists(WORD, min_size=1, max_size=100).map(" ".join), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_every_word_of_every_document_is_found(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("words")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    documents = DocumentFolder(folder)
    for i, text in enumerate(texts):
        for word in text.split()[:10]:
            if word.casefold() not in STOP_WORDS:
                assert f"{i}.txt" in [p.source for p in documents.search(word, 1000)], ascii(word)


def test_the_index_follows_the_folder(notes):
    documents = DocumentFolder(notes)
    (notes / "new.txt").write_text("A zebra.")
    assert sources(documents, "zebra") == ["new.txt"]
    (notes / "new.txt").write_text("A giraffe instead.")
    assert sources(documents, "zebra") == []
    assert sources(documents, "giraffe") == ["new.txt"]
    (notes / "new.txt").rename(notes / "garden" / "old.md")
    assert sources(documents, "giraffe") == ["garden/old.md"]
    (notes / "garden" / "old.md").unlink()
    assert sources(documents, "giraffe") == []
    assert sources(documents, "queen") == ["garden/bees.md"]
    assert sources(DocumentFolder(notes), "queen") == ["garden/bees.md"]


def test_only_changed_files_are_read_again(notes, monkeypatch):
    from nanoghost.tools import retrieval

    documents, read, read_document = DocumentFolder(notes), [], retrieval.read_document
    monkeypatch.setattr(retrieval, "read_document", lambda path: read.append(path.name) or read_document(path))
    documents.search("queen")
    assert read == []
    os.utime(notes / "tea.txt", ns=(1, 1))
    documents.search("queen")
    assert read == ["tea.txt"]


def test_hidden_linked_binary_and_large_files_are_ignored(notes, tmp_path, home):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("The secret xylophone.")
    (notes / "link.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (notes / "folder").symlink_to(tmp_path / "outside")
    (notes / "loop").symlink_to(notes)
    (notes / "broken.txt").symlink_to(notes / "nothing")
    (notes / ".hidden.txt").write_text("xylophone")
    (notes / ".git").mkdir()
    (notes / ".git" / "config.txt").write_text("xylophone")
    (notes / "binary.txt").write_bytes(b"xylophone \0 xylophone")
    (notes / "large.txt").write_bytes(b"xylophone " * (MAX_FILE_BYTES // 10 + 1))
    (notes / "program.py").write_text("xylophone")
    (notes / "two\nlines.txt").write_text("xylophone")
    os.mkfifo(notes / "pipe.txt")
    os.makedirs(os.fsencode(notes) + b"/\xff")
    Path(os.fsdecode(os.fsencode(notes) + b"/\xff/name.txt")).write_text("xylophone")
    documents = DocumentFolder(notes)
    assert documents.search("xylophone") == []
    assert sources(documents, "queen") == ["garden/bees.md"]
    assert stat.S_IMODE(documents.path.parent.stat().st_mode) == 0o700
    assert home in documents.path.parents
    (notes / "tea.txt").unlink()
    (notes / "tea.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    assert documents.search("xylophone") == []
    assert documents.search("tea") == []


def test_unusual_files_are_read_as_far_as_possible(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 noir".encode("latin-1"))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfbeginning")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "Title.MD").write_text("# Only a heading\n")
    documents = DocumentFolder(tmp_path)
    assert sources(documents, "noir") == ["latin.txt"]
    assert sources(documents, "beginning") == ["mark.txt"]
    assert documents.search("beginning")[0].text == "beginning"
    assert documents.search("heading")[0].heading == "Only a heading"


HOSTILE = [
    '"',
    '""',
    "' or 1=1 --",
    '"; drop table passages --',
    "text:queen",
    "queen*",
    "queen NEAR hive",
    "NOT queen",
    "(queen",
    "AND",
    "OR OR",
    "queen AND",
    "^queen",
    "{a b}: queen",
    "-queen",
    "\0queen",
    "queen\0\0",
    "\ud800 queen",
    "\x1b[2J",
    "a" * 10**5,
    "queen " * 10**4,
    "?",
    "%s",
    "𝔮𝔲𝔢𝔢𝔫",
]


@pytest.mark.parametrize("question", HOSTILE, ids=range(len(HOSTILE)))
def test_questions_are_never_fts5_syntax(notes, question):
    documents = DocumentFolder(notes)
    results = documents.search(question)
    assert ("queen" not in question) or results[0].source == "garden/bees.md"
    assert sources(documents, "queen") == ["garden/bees.md"]


@given(st.text(st.sampled_from(string.punctuation + " \0queenOR"), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_searched(question):
    assert TextIndex(["the queen", "OR"]).search(question, 2) in ([], [0], [1], [0, 1], [1, 0])


def test_threads_can_search_at_once(notes):
    documents, results = DocumentFolder(notes), []
    (notes / "late.txt").write_text("A late zebra.")
    threads = [threading.Thread(target=lambda: results.append(sources(documents, "zebra"))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [["late.txt"]] * 4


LARGE_TEXTS = [
    "word " * (MAX_FILE_BYTES // 5),
    "a" * MAX_FILE_BYTES,
    "#" + " " * (MAX_FILE_BYTES - 1),
    "# " + "b" * (MAX_FILE_BYTES - 2),
    "\n" * MAX_FILE_BYTES,
    "\n" + " " * (MAX_FILE_BYTES - 1),
]


@pytest.mark.parametrize("text", LARGE_TEXTS, ids=range(6))
def test_large_files_of_unusual_form_are_fast(tmp_path, text):
    (tmp_path / "odd.md").write_text(text)
    (tmp_path / "other.md").write_text("queen")
    start = time.monotonic()
    documents = DocumentFolder(tmp_path)
    results = [*documents.search("word"), *documents.search(text[-40:])]
    assert time.monotonic() - start < 10
    assert all(len(passage.snippet) <= MAX_SNIPPET_CHARACTERS for passage in results)


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        DocumentFolder(tmp_path / "nothing")
