"""Tokenize a source once; later runs with the same text and tokenizer memory-map the files (token_dataset.py).

A killed run resumes: the position is saved in the partial folder every SAVE_CHARACTERS characters.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanoghost.data.block_checksums import file_checksums
from nanoghost.data.sources import SPLITS, Source
from nanoghost.data.token_dataset import FORMAT, TokenDataset, open_token_dataset
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home, read_json, write_json
from nanoghost.tokenizer.tokenizer import Tokenizer

# Larger files are verified block by block during training: verifying everything at once would delay every start.
BLOCK_CHECKSUM_MIN_BYTES = 64 * 2**20
CHUNK_CHARACTERS = 2**17  # text that the tokenizer gets at once
SAVE_CHARACTERS = 2**24  # text between two saves of the position: the most that is lost when the process is killed
CHUNKS_PER_CALL = 32  # the tokenizer distributes them over the cores


def load_or_train_tokenizer(
    source: Source, vocab_size: int, log: Callable[[str], None], examples: Sequence[str] = ()
) -> Tokenizer:
    """The tokenizer trained on the source's training text and on `examples`. It is cached in the home folder."""
    key = hashlib.sha256(json.dumps([source.fingerprint, *examples]).encode()).hexdigest()
    folder = home() / "data" / "tokenizers" / f"{key[:12]}-{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        start = time.perf_counter()
        texts = (document.text for document in source.documents() if document.split == "train")
        tokenizer = Tokenizer.train(chain(texts, examples), vocab_size)
        tokenizer.save(folder)
        log(f"tokenizer: trained {tokenizer.vocab_size} tokens in {time.perf_counter() - start:.1f} s")
    return Tokenizer.load(folder)


def tokenize_source(source: Source, tokenizer) -> TokenDataset:
    """The tokens of a source. The first call tokenizes the text; later calls open the files."""
    if "<|endoftext|>" not in tokenizer.special_tokens:
        raise UserError("this tokenizer has no <|endoftext|> token, which separates documents")
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    folder = home() / "data" / f"{source.name}-{key[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if source.parts:
        return tokenize_mixture(source, tokenizer, folder)
    with exclusive_lock(folder.parent):  # of several processes, the first one tokenizes and the others wait
        if not folder.exists():
            partial = folder.parent / f".partial-{key[:8]}"
            partial.mkdir(exist_ok=True)
            try:
                write_token_dataset(partial, source, tokenizer)
                partial.rename(folder)
                (folder / "position.json").unlink()
            finally:
                remove_unusable_partials(folder.parent)
    dataset = open_token_dataset(folder)
    same_source = dataset.manifest["source"]["fingerprint"] == source.fingerprint
    same_tokenizer = dataset.manifest["tokenizer"] == tokenizer.fingerprint
    if not (same_source and same_tokenizer):
        raise UserError(
            f"{folder} was made from other text or another tokenizer: remove it, and the next run makes it again"
        )
    return dataset


def remove_unusable_partials(data_folder: Path) -> None:
    """Remove partial folders without a saved position, also those of killed processes."""
    for partial in data_folder.glob(".partial*"):
        if not (partial / "position.json").exists():
            shutil.rmtree(partial)


def write_token_dataset(folder: Path, source: Source, tokenizer) -> None:
    """Write files and manifest. Resumes at the position that an earlier process saved in the folder."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    endoftext = tokenizer.special_id("<|endoftext|>")
    position_file = folder / "position.json"
    if position_file.exists():
        position = read_json(position_file)
    else:
        empty = {"tokens": 0, "bytes": 0, "documents": 0}
        position = {"document": -1, "character": 0, "splits": {split: dict(empty) for split in SPLITS}}
    splits = position["splits"]
    unsaved_characters = 0
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "ab")) for split in SPLITS}
        for split, file in files.items():
            file.truncate(splits[split]["tokens"] * dtype.itemsize)  # discard what was written after the last save
        chunks = document_chunks(source, max(0, position["document"]), position["character"])
        while True:
            group = list(islice(chunks, CHUNKS_PER_CALL))
            if not group:
                break
            encoded = tokenizer.encode_batch([chunk.text for chunk in group])
            for chunk, ids in zip(group, encoded):
                if chunk.starts_document:
                    ids = [endoftext, *ids]
                    position["document"] += 1
                    position["character"] = 0
                    splits[chunk.split]["documents"] += 1
                files[chunk.split].write(np.array(ids, dtype).tobytes())
                splits[chunk.split]["tokens"] += len(ids)
                splits[chunk.split]["bytes"] += len(chunk.text.encode())
                position["character"] += len(chunk.text)
                unsaved_characters += len(chunk.text)
            if unsaved_characters > SAVE_CHARACTERS:
                save_position(position, position_file, files)
                unsaved_characters = 0
        save_position(position, position_file, files)
    for split in SPLITS:
        splits[split] |= file_checksums(folder / f"{split}.bin", BLOCK_CHECKSUM_MIN_BYTES)
    manifest = {
        "format": FORMAT,
        "source": source.summary(),
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype.str,
        "endoftext": endoftext,
        "splits": splits,
    }
    write_json(folder / "manifest.json", manifest)


def save_position(position: dict, position_file: Path, files: dict) -> None:
    """Flush the files to disk first: the saved position never points past their end."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    write_json(position_file, position)


# ── chunks of documents ──────────────────────────────────────────────────────────────────────────────────────────────


class Chunk(NamedTuple):
    split: str
    text: str
    starts_document: bool


def document_chunks(source: Source, skip: int = 0, start: int = 0) -> Iterator[Chunk]:
    """The documents, long ones in chunks of about CHUNK_CHARACTERS characters.

    A whole book at once would occupy only one core and gigabytes of the tokenizer's memory. Omits the first `skip`
    documents and the first `start` characters of the next one.
    """
    for document in source.documents(skip):
        while start < len(document.text):
            end = cut_between_tokens(document.text, start + CHUNK_CHARACTERS)
            yield Chunk(document.split, document.text[start:end], start == 0)
            start = end
        start = 0


LINE_END_BETWEEN_VISIBLE_CHARACTERS = re.compile(r"(?<=\S\n)(?=\S)")


def cut_between_tokens(text: str, after: int) -> int:
    """The first position from `after` on where a cut does not change the tokens.

    This is after a single line end between two visible characters: pre-tokenizers only look ahead over a run of white
    space (GPT-2's `\\s+(?!\\S)`), and none joins a line end to the character after it.
    """
    match = LINE_END_BETWEEN_VISIBLE_CHARACTERS.search(text, min(after, len(text)))
    return match.start() if match else len(text)


# ── mixtures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokenize_mixture(source: Source, tokenizer, folder: Path) -> TokenDataset:
    """Tokenize the parts of a mixture and concatenate their tokens."""
    if not folder.exists():
        parts = [tokenize_source(part, tokenizer) for part, _ in source.parts]
        with exclusive_lock(folder.parent):
            if not folder.exists():
                partial = folder.with_name(".partial-mixture")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                concatenate_token_datasets(partial, source, parts)
                partial.rename(folder)
    return open_token_dataset(folder)


def concatenate_token_datasets(folder: Path, source: Source, parts: list[TokenDataset]) -> None:
    splits = {}
    for split in SPLITS:
        with open(folder / f"{split}.bin", "wb") as output:
            for part in parts:
                with open(part.folder / f"{split}.bin", "rb") as f:
                    shutil.copyfileobj(f, output)
        figures = [part.manifest["splits"][split] for part in parts]
        splits[split] = {key: sum(f[key] for f in figures) for key in ("tokens", "bytes", "documents")}
        splits[split] |= file_checksums(folder / f"{split}.bin", BLOCK_CHECKSUM_MIN_BYTES)
    mixture = []
    for part, (_, weight) in zip(parts, source.parts):
        tokens = part.manifest["splits"]["train"]["tokens"]
        mixture.append({"source": part.manifest["source"], "weight": weight, "tokens": tokens})
    manifest = parts[0].manifest | {"source": source.summary(), "splits": splits, "mixture": mixture}
    write_json(folder / "manifest.json", manifest)
