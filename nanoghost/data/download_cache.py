"""A cache of remote files on disk with a size limit."""

import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nanoghost.data.file_reader import text_suffix
from nanoghost.data.retry import retry
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home

REQUEST_BYTES = 2**23
"""Bytes per request."""
DEFAULT_GB = 10.0


@dataclass(frozen=True)
class RemoteFile:
    path: str
    size: int
    version: str
    """Changes when the content changes."""


def cache_limit() -> int:
    """Size limit in bytes: NANOGHOST_CACHE_GB, or DEFAULT_GB."""
    gigabytes = os.environ.get("NANOGHOST_CACHE_GB") or DEFAULT_GB
    try:
        return int(float(gigabytes) * 1e9)
    except ValueError:
        raise UserError(f"NANOGHOST_CACHE_GB is '{gigabytes}', not a number") from None


class DownloadCache:
    """Whole files, at most `limit` bytes of them. The least recently used files are removed first."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit

    def fetch(self, fs, file: RemoteFile) -> Path:
        """The local copy of a file. A download that was interrupted resumes where it stopped."""
        key = hashlib.sha256(f"{file.path} {file.version}".encode()).hexdigest()[:24]
        target = self.folder / (key + text_suffix(file.path))
        partial_file = target.with_suffix(".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.folder):
            if not target.exists():
                self.make_room(file, partial_file)
                download(fs, file, partial_file)
                partial_file.replace(target)
            os.utime(target)
        return target

    def make_room(self, file: RemoteFile, partial_file: Path) -> None:
        if file.size > self.limit:
            raise UserError(
                f"{file.path} has {file.size:,} bytes, and the limit of the cache is {self.limit:,}:"
                " set NANOGHOST_CACHE_GB to a larger value"
            )
        cached_files = [p for p in self.folder.iterdir() if p.suffix != ".json" and p != partial_file]
        cached_files.sort(key=lambda p: p.stat().st_mtime)
        used = sum(p.stat().st_size for p in cached_files)
        while used + file.size > self.limit:
            oldest = cached_files.pop(0)
            used -= oldest.stat().st_size
            oldest.unlink()


def default_cache() -> DownloadCache:
    return DownloadCache(home() / "data" / "cache", cache_limit())


def download(fs, file: RemoteFile, target: Path) -> None:
    """Append the rest of the remote file to `target`."""
    with open(target, "ab") as f:
        while f.tell() < file.size:
            start = f.tell()
            end = min(start + REQUEST_BYTES, file.size)
            chunk = retry(partial(fs.cat_file, file.path, start=start, end=end), file.path)
            if len(chunk) != end - start:
                raise UserError(f"{file.path} changed while it was read: run the command again")
            f.write(chunk)
            f.flush()
        os.fsync(f.fileno())
