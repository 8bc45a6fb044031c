"""A data source: named documents with a split, a license and a fingerprint. registry.py opens one."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "val", "test")
MAX_NAME = 60  # characters of a source's name


@dataclass(frozen=True)
class Document:
    name: str
    text: str
    split: str
    """One of SPLITS."""


@dataclass(frozen=True)
class Source:
    name: str
    """Fit for a folder name: letters, digits, '.', '_', '-'."""
    license: str
    attribution: str
    fingerprint: str
    """SHA-256 (hex) over names and contents. It does not depend on the machine or on the place of the files."""
    documents: Callable[..., Iterator[Document]]
    """Streams the documents at each call, without the first `skip`: a source may be larger than memory."""
    parts: tuple[tuple["Source", float], ...] = ()
    """The sources of a mixture with their weights; empty for other sources."""

    def summary(self) -> dict:
        """The values that manifests and model cards store."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "license": self.license,
            "attribution": self.attribution,
        }


def fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 (hex) over (name, content) pairs in their order."""
    total = hashlib.sha256()
    for name, content in parts:
        total.update(hashlib.sha256(name.encode(errors="surrogateescape")).digest() + hashlib.sha256(content).digest())
    return total.hexdigest()


def sha256_of(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_name(name: str) -> str:
    """`name` with a hyphen in place of characters that a folder name should not have, and not too long for a prefix."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_NAME].strip(".-") or "text"
