"""Local text: a .txt, .md, .jsonl, .json or .parquet file, or a folder of them."""

import os
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nanoghost.data.file_reader import ALL_SUFFIXES, SUFFIXES, read_texts, text_suffix
from nanoghost.data.rows import check_is_no_table
from nanoghost.data.sources import Document, Source, fingerprint, folder_name, sha256_of
from nanoghost.data.splits import split_texts
from nanoghost.data.text_io import note_skipped, problem_of
from nanoghost.errors import UserError


def open_local(path: Path) -> Source:
    """One file, or all files of a folder in the order of their names. Standard error says which are skipped."""
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{problem_of(path)}; text is read several times: write it into a file")
    files = text_files(path)
    if not files:
        check_is_no_table(path)
        raise UserError(f"{path}: no readable text; it must be a {', '.join(ALL_SUFFIXES)} file, or a folder of them")

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
        return {path.name: path} if path.is_file() and text_suffix(path.name) in ALL_SUFFIXES else {}
    files, skipped = list_folder(path)
    note_skipped(path, skipped)
    return dict(sorted(files.items()))


def list_folder(path: Path) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """({name: file}, {reason: names of what is skipped}). Links are followed, to each folder once."""
    files, skipped = {}, defaultdict(list)
    folders, resolved = deque([path]), set()
    while folders:
        folder = folders.popleft()
        if folder.resolve() in resolved:
            skipped["linked, but read already"].append(folder.relative_to(path).as_posix())
            continue
        resolved.add(folder.resolve())
        for child in sorted(folder.iterdir()):
            name = child.relative_to(path).as_posix()
            if child.name.startswith("."):
                skipped["hidden"].append(name)
            elif not os.access(child, os.R_OK):
                skipped["behind broken links" if child.is_symlink() else "without permission to read"].append(name)
            elif child.is_dir() and child.is_symlink():
                folders.append(child)
            elif child.is_dir():
                folders.appendleft(child)  # before the links: a folder keeps its own name
            elif child.is_file() and text_suffix(name) in SUFFIXES:
                files[name] = child
            else:
                skipped["of other kinds"].append(name)
    return files, skipped
