"""Text that lies elsewhere, by URL: s3://bucket/folder, gs://..., https://..., file://..., all that fsspec opens.

Files come whole into a cache of limited size, with retries, and are read from there like your own. Each file that was read
to its end notes how many documents it has, so reading can go on at any document without fetching the files before it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.core import has_magic, url_to_fs

from nanoghost.data.local import FEW, SUFFIXES, certain_splits, read_texts, split_texts, with_split
from nanoghost.data.sources import Document, Source, fingerprint, folder_name
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home, read_json, write_json

CHUNK = 2**23
"""Bytes to a request."""
FAILURES = 6
"""So many in a row, without a byte between them, and we give up: with pauses of 1, 2, 4, 8 and 16 seconds."""
PAUSE = 1.0
CACHE_GB = 10.0
"""Unless $NANOGHOST_CACHE_GB says otherwise."""
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "oid", "checksum")
"""What the stores call the fingerprint of a file's contents."""


@dataclass(frozen=True)
class RemoteFile:
    path: str
    size: int
    version: str
    """Changes when the contents do."""


def open_remote(url: str) -> Source:
    """The .txt, .md, .jsonl and .parquet files under a URL (a file, a folder, or a pattern with *)."""
    try:
        fs, root = url_to_fs(url)
    except ImportError as error:  # each store needs a package of its own, which fsspec names
        raise UserError(f"{url}: {error} (pip install s3fs, gcsfs ...)") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    files = listed(fs, root, url)
    return source_of(fs, files, root, folder_name(PurePosixPath(root).stem), "unknown (remote files)", url)


def listed(fs: fsspec.AbstractFileSystem, root: str, url: str) -> list[RemoteFile]:
    """The files that can be read, in the order of their paths; hidden ones are skipped."""

    def look():
        if fs.isfile(root):
            return [fs.info(root)]
        found = fs.glob(root, detail=True) if has_magic(root) else fs.find(root, detail=True)
        return [info for info in found.values() if info["type"] == "file"]

    infos = patiently(look, url)
    fs.invalidate_cache()  # or a later listing shows what is gone
    infos = sorted((i for i in infos if PurePosixPath(i["name"]).suffix.lower() in SUFFIXES), key=lambda i: i["name"])
    own = set(PurePosixPath(root).parts)  # who names a hidden folder wants it
    infos = [i for i in infos if not any(p.startswith(".") and p not in own for p in PurePosixPath(i["name"]).parts)]
    if not infos:
        raise UserError(f"{url}: no {', '.join(SUFFIXES)} file there")
    return [RemoteFile(info["name"], info["size"], version(info)) for info in infos]


def version(info: dict) -> str:
    """Of a store that has no fingerprints: size and time of writing."""
    marks = [str(info[key]) for key in VERSIONS if info.get(key)]
    return marks[0] if marks else f"{info['size']} {info.get('mtime') or info.get('created') or ''}"


def source_of(
    fs, files: list[RemoteFile], root: str, name: str, license: str, where: str, max_bytes: int | None = None
) -> Source:
    short = {f.path: f.path.removeprefix(root).lstrip("/") or PurePosixPath(f.path).name for f in files}
    mark = fingerprint([(str(max_bytes), b""), *((short[f.path], f.version.encode()) for f in files)])
    cache = Cache(home() / "data" / "cache", cache_bytes())
    notes = cache.folder / f"{mark[:16]}.json"

    def texts(skip: int) -> Iterator[tuple[str, str]]:
        """All (name, text) but the first `skip`, up to max_bytes of them."""
        counted = read_json(notes) if notes.exists() else {}
        total = 0
        for file in files:
            known = counted.get(file.path)
            if known and known["texts"] <= skip:
                skip, total = skip - known["texts"], total + known["bytes"]
                continue
            found = {"texts": 0, "bytes": 0}
            here = cache.fetch(fs, file)
            try:
                for label, text in read_texts(short[file.path], here):
                    if not text:
                        continue
                    found = {"texts": found["texts"] + 1, "bytes": found["bytes"] + len(text.encode())}
                    if max_bytes and total + found["bytes"] > max_bytes:
                        return
                    if skip:
                        skip -= 1
                    else:
                        yield label, text
            except UserError as error:  # it names the copy
                raise UserError(f"{file.path}: {error}") from None
            total += found["bytes"]
            counted[file.path] = found
            write_json(notes, counted)

    def documents(skip: int = 0) -> Iterator[Document]:
        if skip < FEW:
            return islice(split_texts(texts(0), empty=f"{where}: there is no text in it"), skip, None)
        certain = certain_splits(text for _, text in islice(texts(0), FEW))
        return (with_split(label, text, certain) for label, text in texts(skip))

    return Source(name, license, where, mark, documents)


def cache_bytes() -> int:
    said = os.environ.get("NANOGHOST_CACHE_GB") or CACHE_GB
    try:
        return int(float(said) * 1e9)
    except ValueError:
        raise UserError(f"NANOGHOST_CACHE_GB is '{said}', not a number") from None


class Cache:
    """Whole files on disk, at most `limit` bytes of them; those that were not used for longest go first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def fetch(self, fs, file: RemoteFile) -> Path:
        """The file here; what a killed process fetched of it is not fetched again."""
        key = hashlib.sha256(f"{file.path} {file.version}".encode()).hexdigest()[:24]
        target = self.folder / (key + PurePosixPath(file.path).suffix.lower())
        partial = target.with_suffix(".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.folder):
            if not target.exists():
                self.make_room(file, partial)
                with open(partial, "ab") as f:
                    while f.tell() < file.size:
                        start, end = f.tell(), min(f.tell() + CHUNK, file.size)
                        chunk = patiently(lambda: fs.cat_file(file.path, start=start, end=end), file.path)  # noqa: B023
                        if len(chunk) != end - start:
                            raise UserError(f"{file.path} changed while it was read: run the command again")
                        f.write(chunk)
                        f.flush()
                    os.fsync(f.fileno())
                partial.replace(target)
            os.utime(target)
        return target

    def make_room(self, file: RemoteFile, partial: Path) -> None:
        if file.size > self.limit:
            raise UserError(
                f"{file.path} has {file.size:,} bytes, the cache {self.limit:,}: set NANOGHOST_CACHE_GB to more than that"
            )
        others = [p for p in self.folder.iterdir() if p.suffix != ".json" and p != partial]
        others.sort(key=lambda p: p.stat().st_mtime)
        used = sum(p.stat().st_size for p in others)
        while used + file.size > self.limit:
            used -= others[0].stat().st_size
            others.pop(0).unlink()


def patiently(ask: Callable, what: str):
    """What `ask` returns, asking again after failures that may pass."""
    for failure in range(FAILURES):
        try:
            return ask()
        except (FileNotFoundError, PermissionError, UserError) as error:
            raise UserError(f"cannot read {what}: {error}") from None
        except Exception as error:  # noqa: BLE001  an edge: every store's client raises its own
            if failure == FAILURES - 1:
                why = str(error).strip().partition("\n")[0] or type(error).__name__
                raise UserError(f"cannot read {what}, tried {FAILURES} times: {why}") from error
            time.sleep(PAUSE * 2**failure)
