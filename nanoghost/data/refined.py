"""Text that `nanoghost data refine` produced, as a source."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nanoghost.data.file_reader import read_texts
from nanoghost.data.sources import Document, Source, fingerprint, sha256_of
from nanoghost.data.splits import split_texts
from nanoghost.errors import UserError
from nanoghost.home import home, read_json


def refined_folder(name: str) -> Path | None:
    """The folder of refined text with that name; None if there is none. Folders of tokens have a manifest, too."""
    folder = home() / "data" / name
    manifest = folder / "manifest.json"
    return folder if manifest.exists() and "refine_settings" in read_json(manifest) else None


def open_refined(folder: Path) -> Source:
    """The documents of a folder of refined text, with license and attribution of the original source."""
    manifest = read_json(folder / "manifest.json")
    source, files = manifest["source"], manifest["files"]
    documents_in, documents_out = manifest["input"]["documents"], manifest["output"]["documents"]

    def texts() -> Iterator[tuple[str, str]]:
        for name, entry in files.items():
            if sha256_of(folder / name) != entry["sha256"]:
                raise UserError(
                    f"{folder / name} is damaged (it differs from manifest.json): remove {folder} and refine again"
                )
            yield from read_texts(name, folder / name)

    def documents(skip: int = 0) -> Iterator[Document]:
        return islice(split_texts(texts(), error_if_empty=f"{folder}: it contains no text"), skip, None)

    return Source(
        name=folder.name,
        license=source["license"],
        attribution=f"{source['attribution']}; refined: {documents_out:,} of {documents_in:,} documents",
        fingerprint=fingerprint((name, bytes.fromhex(entry["sha256"])) for name, entry in files.items()),
        documents=documents,
    )
