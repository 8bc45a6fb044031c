"""Text by URL: s3://bucket/folder, gs://..., https://..., file://..., everything that fsspec opens.

Whole files are downloaded into a cache (download_cache.py) and read from there like local files. The number of
documents in each complete file is stored, so reading can resume at any document without the files before it.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import PurePosixPath

import fsspec
from fsspec.core import has_magic, url_to_fs

from nanoghost.data.download_cache import DownloadCache, RemoteFile, default_cache
from nanoghost.data.file_reader import ALL_SUFFIXES, SUFFIXES, read_texts, text_suffix
from nanoghost.data.retry import retry
from nanoghost.data.sources import Document, Source, fingerprint, folder_name
from nanoghost.data.splits import MIN_DOCUMENTS, assign_split, split_texts, splits_of_lowest_hashes
from nanoghost.data.text_io import note_skipped
from nanoghost.errors import UserError
from nanoghost.home import read_json, write_json

VERSION_KEYS = ("ETag", "etag", "md5Hash", "blob_id", "oid", "checksum")
"""Names that the stores use for the fingerprint of a file's content."""


def open_remote(url: str) -> Source:
    """The files under a URL (a file, a folder, or a pattern with *) that local.py would read."""
    try:
        fs, root = url_to_fs(url)  # some stores are asked already here
        is_named = has_magic(root) or text_suffix(root) in ALL_SUFFIXES  # not a folder with many kinds of files
        files = list_files(fs, root, url, ALL_SUFFIXES if is_named else SUFFIXES)
    except ImportError as error:  # most stores need a package of their own; fsspec names it
        raise UserError(f"{url}: {error} (pip install aiohttp requests; for other stores s3fs, gcsfs ...)") from None
    except (ValueError, OSError) as error:  # not an address; no connection
        raise UserError(f"{url} cannot be read: {error}") from None
    name = folder_name(PurePosixPath(root).stem)
    return RemoteFiles(fs, root, files).source(name, license="unknown (remote files)", attribution=url)


def list_files(fs: fsspec.AbstractFileSystem, root: str, url: str, suffixes: Sequence[str]) -> list[RemoteFile]:
    """The files with these endings, in the order of their paths. Hidden files are skipped, unless `root` is hidden."""
    infos = retry(partial(file_infos, fs, root), url)
    fs.invalidate_cache()  # otherwise a later listing shows files that are gone
    root_parts = set(PurePosixPath(root).parts)
    files, skipped = [], defaultdict(list)
    for info in sorted(infos, key=lambda info: info["name"]):
        path = PurePosixPath(info["name"])
        if any(part.startswith(".") and part not in root_parts for part in path.parts):
            skipped["hidden"].append(path.name)
        elif text_suffix(path.name) not in suffixes:
            skipped["of other kinds"].append(path.name)
        else:
            files.append(RemoteFile(info["name"], info["size"], content_version(info)))
    if not files:
        raise_if_unreachable(fs, root, url)
        raise UserError(f"{url}: no {', '.join(suffixes)} file there")
    note_skipped(url, skipped)
    return files


def raise_if_unreachable(fs: fsspec.AbstractFileSystem, root: str, url: str) -> None:
    """fsspec takes a web server that does not answer for one without the file. Raises UserError with the reason."""
    if "http" not in fs.protocol or has_magic(root):
        return
    try:
        fs.info(root)
    except FileNotFoundError as error:
        raise UserError(f"{url} cannot be read: {error.__cause__ or 'the server has no such file'}") from None


def file_infos(fs: fsspec.AbstractFileSystem, root: str) -> list[dict]:
    """fsspec's description of each file at `root`."""
    if fs.isfile(root):
        return [fs.info(root)]
    entries = fs.glob(root, detail=True) if has_magic(root) else fs.find(root, detail=True)
    return [info for info in entries.values() if info["type"] == "file"]


def content_version(info: dict) -> str:
    """The store's fingerprint of a file; size and time of modification if it has none."""
    for key in VERSION_KEYS:
        if info.get(key):
            return str(info[key])
    return f"{info['size']} {info.get('mtime') or info.get('created') or ''}"


@dataclass(frozen=True)
class RemoteFiles:
    """Files of one file system, read in their order."""

    fs: fsspec.AbstractFileSystem
    root: str
    files: list[RemoteFile]
    max_bytes: int | None = None
    """Stop after this much text."""
    cache: DownloadCache = field(default_factory=default_cache)

    def source(self, name: str, license: str, attribution: str) -> Source:
        return Source(name, license, attribution, self.fingerprint(), partial(self.documents, attribution))

    def short_name(self, file: RemoteFile) -> str:
        """The path below the root."""
        return file.path.removeprefix(self.root).lstrip("/") or PurePosixPath(file.path).name

    def fingerprint(self) -> str:
        versions = [(self.short_name(file), file.version.encode()) for file in self.files]
        return fingerprint([(str(self.max_bytes), b""), *versions])

    def documents(self, where: str, skip: int = 0) -> Iterator[Document]:
        if skip < MIN_DOCUMENTS:
            return islice(split_texts(self.texts(), error_if_empty=f"{where}: it contains no text"), skip, None)
        forced_splits = splits_of_lowest_hashes(text for _, text in islice(self.texts(), MIN_DOCUMENTS))
        return (assign_split(name, text, forced_splits) for name, text in self.texts(skip))

    def texts(self, skip: int = 0) -> Iterator[tuple[str, str]]:
        """Yield all (name, text) except the first `skip`, up to `max_bytes` of text."""
        counts_file = self.cache.folder / f"{self.fingerprint()[:16]}.json"
        counts_by_path = read_json(counts_file) if counts_file.exists() else {}
        total_bytes = 0
        for file in self.files:
            counts = counts_by_path.get(file.path)
            if counts and counts["texts"] <= skip:  # nothing of this file is needed
                skip -= counts["texts"]
                total_bytes += counts["bytes"]
                continue
            counts = {"texts": 0, "bytes": 0}
            local_copy = self.cache.fetch(self.fs, file)
            try:
                for name, text in read_texts(self.short_name(file), local_copy):
                    if not text:
                        continue
                    counts["texts"] += 1
                    counts["bytes"] += len(text.encode())
                    if self.max_bytes and total_bytes + counts["bytes"] > self.max_bytes:
                        return
                    if skip:
                        skip -= 1
                    else:
                        yield name, text
            except UserError as error:  # it names the local copy
                raise UserError(f"{file.path}: {error}") from None
            total_bytes += counts["bytes"]
            counts_by_path[file.path] = counts
            write_json(counts_file, counts_by_path)
