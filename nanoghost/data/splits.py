"""Train, validation and test splits of documents that come without one.

The split of a document depends on its text alone: copies are always in one split, and more data never moves a document.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from nanoghost.data.sources import SPLITS, Document
from nanoghost.errors import UserError

HELD_OUT_FRACTION = 0.05
"""Fraction of the text for validation, and the same fraction for test."""

MIN_DOCUMENTS = 20
"""With fewer documents, each one is cut into the three splits; otherwise whole documents are held out."""


def split_texts(texts: Iterable[tuple[str, str]], error_if_empty: str) -> Iterator[Document]:
    """Turn (name, text) pairs into documents with a split. Empty texts are skipped; UserError if all are empty."""
    texts = ((name, text) for name, text in texts if text)
    first = list(islice(texts, MIN_DOCUMENTS))
    if not first:
        raise UserError(error_if_empty)
    if len(first) < MIN_DOCUMENTS:
        for name, text in first:
            yield from cut_document(name, text)
        return
    forced_splits = splits_of_lowest_hashes(text for _, text in first)
    for name, text in chain(first, texts):
        yield assign_split(name, text, forced_splits)


def splits_of_lowest_hashes(texts: Iterable[str]) -> dict[float, str]:
    """{hash: split} of the two texts with the lowest hashes among the first MIN_DOCUMENTS: they are always held out.

    Chance alone would leave 20 documents without a validation document one time in three.
    """
    lowest = sorted({hash_fraction(text) for text in texts})
    return dict(zip(lowest, ("test", "val")))


def assign_split(name: str, text: str, forced_splits: dict[float, str]) -> Document:
    fraction = hash_fraction(text)
    if fraction in forced_splits:
        split = forced_splits[fraction]
    elif fraction < HELD_OUT_FRACTION:
        split = "test"
    elif fraction < 2 * HELD_OUT_FRACTION:
        split = "val"
    else:
        split = "train"
    return Document(name, text, split)


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def cut_document(name: str, text: str) -> Iterator[Document]:
    """Up to three parts of one document, cut near 90% and 95% at the end of a paragraph, a line or a word."""
    val_start = cut_position(text, 1 - 2 * HELD_OUT_FRACTION)
    test_start = max(val_start, cut_position(text, 1 - HELD_OUT_FRACTION))
    parts = (text[:val_start], text[val_start:test_start], text[test_start:])
    for split, part in zip(SPLITS, parts):
        if part:
            yield Document(name, part, split)


def cut_position(text: str, fraction: float) -> int:
    """The last end of a paragraph, line or word shortly before `fraction` of the text, or else exactly there."""
    end = int(len(text) * fraction)
    begin = end - int(len(text) * HELD_OUT_FRACTION / 2)
    for separator in ("\n\n", "\n", " "):
        position = text.rfind(separator, begin, end)
        if position >= 0:
            return position + len(separator)
    return end
