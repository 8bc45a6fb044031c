"""Local text: a .txt, .md, .jsonl or .parquet file, or a folder of them."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nanoghost.data.file_reader import SUFFIXES, read_texts
from nanoghost.data.sources import Document, Source, fingerprint, folder_name, sha256_of
from nanoghost.data.splits import split_texts
from nanoghost.errors import UserError


def open_local(path: Path) -> Source:
    """One file, or all files of a folder in the order of their names; hidden files are skipped."""
    files = text_files(path)
    if not files:
        raise UserError(f"{path}: no readable text; it must be a {', '.join(SUFFIXES)} file, or a folder of them")

    def texts() -> Iterator[tuple[str, str]]:
        for name, file in files.items():
            yield from read_texts(name, file)

    def documents(skip: int = 0) -> Iterator[Document]:
        return islice(split_texts(texts(), error_if_empty=f"{path}: it contains no text"), skip, None)

    return Source(
        name=folder_name(path.resolve().stem),
        license="unknown (local files)",
        attribution=f"local text '{path.resolve().name}'",
        fingerprint=fingerprint((name, bytes.fromhex(sha256_of(file))) for name, file in files.items()),
        documents=documents,
    )


def text_files(path: Path) -> dict[str, Path]:
    """{name: file}; the names are relative to the folder."""
    if not path.is_dir():
        return {path.name: path} if path.suffix.lower() in SUFFIXES else {}
    candidates = [p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES]
    files = {}
    for name in sorted(p.relative_to(path).as_posix() for p in candidates):
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not hidden:
            files[name] = path / name
    return files
