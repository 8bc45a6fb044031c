"""Text tokenised once into memory-mapped files.

    $NANOGHOST_HOME/data/plays-1f0c93ab/
        train.bin  val.bin  test.bin    token ids, little-endian, each document preceded by <|endoftext|>
        manifest.json                   what they were made from, under which license, and their SHA-256

The name ends in a fingerprint of source and tokenizer: another text or another tokenizer gets another folder.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from nanoghost.data.batches import Batches
from nanoghost.data.sources import SPLITS, Source, sha256_of
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home, read_json, write_json
from nanoghost.tokenizer.tokenizer import Tokenizer

FORMAT = 2
CHECKED_BYTES = (
    64 * 2**20
)  # larger files are checked piece by piece when training reads them: all at once would delay every start
PIECE = 2**17  # characters given to the tokenizer at once
NOTE = 2**24  # characters after which the position is noted: what a kill costs
NOTHING = dict.fromkeys(SPLITS, {"tokens": 0, "bytes": 0, "documents": 0})
GROUP = 32  # pieces (or short documents) to a call, which the tokenizer spreads over the cores


@dataclass(frozen=True)
class Shards:
    folder: Path
    manifest: dict

    def tokens(self, split: str) -> np.ndarray:
        """All token ids of a split, [N], mapped from disk."""
        count = self.manifest["splits"][split]["tokens"]
        if count == 0:
            return np.empty(0, self.manifest["dtype"])  # an empty file can't be mapped
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")

    def check(self, split: str):
        """A function of (positions, tokens), to be called before tokens from these positions on are used: each block of the file
        is compared with its checksum at first touch. None where opening did that for all of them."""
        from nanoghost.data.block_checksums import Blocks

        blocks = self.manifest["splits"][split].get("blocks")
        return blocks and Blocks(self.folder / f"{split}.bin", blocks, np.dtype(self.manifest["dtype"]).itemsize).check

    def batches(self, *layout) -> Batches:
        """Of the training text; `layout` is (context, rows, seed, rank, world)."""
        if "mixture" in self.manifest:
            from nanoghost.data.mixture import MixedBatches

            return MixedBatches(self.tokens("train"), self.manifest["mixture"], *layout, check=self.check("train"))
        return Batches(self.tokens("train"), *layout, check=self.check("train"))

    def bytes(self, split: str) -> int:
        """How many bytes of UTF-8 text the split holds: the denominator of bits per byte."""
        return self.manifest["splits"][split]["bytes"]


def tokenizer_for(source, vocab_size: int, say, examples: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer learned from this source's training text and from `examples`; kept in the home folder.

    `say` tells that one was learned.
    """
    key = hashlib.sha256(json.dumps([source.fingerprint, *examples]).encode()).hexdigest()
    folder = home() / "data" / "tokenizers" / f"{key[:12]}-{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        start = time.perf_counter()
        texts = (d.text for d in source.documents() if d.split == "train")
        tokenizer = Tokenizer.train(chain(texts, examples), vocab_size)
        tokenizer.save(folder)
        say(f"tokenizer: {tokenizer.vocab_size} tokens learned in {time.perf_counter() - start:.1f} s")
    return Tokenizer.load(folder)


def tokenise(source: Source, tokenizer) -> Shards:
    """The shards of this text under this tokenizer, made at the first call and found again at later ones."""
    if "<|endoftext|>" not in tokenizer.specials:
        raise UserError("this tokenizer has no <|endoftext|>, the mark that stands between texts")
    key = hashlib.sha256(f"{FORMAT} {source.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    folder = home() / "data" / f"{source.name}-{key[:8]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if source.parts:
        from nanoghost.data.mixture import tokenise_mixture

        return tokenise_mixture(source, tokenizer, folder)
    with exclusive_lock(folder.parent):  # of several ranks the first one works and the others wait for it
        if not folder.exists():
            partial = folder.parent / f".partial-{key[:8]}"
            partial.mkdir(exist_ok=True)
            try:
                write_shards(partial, source, tokenizer)
                partial.rename(folder)
                (folder / "position.json").unlink()
            finally:
                for left in folder.parent.glob(".partial*"):  # of processes that were killed, too
                    if not (left / "position.json").exists():
                        shutil.rmtree(left)
    shards = open_shards(folder)
    made_from = (shards.manifest["source"]["fingerprint"], shards.manifest["tokenizer"])
    if made_from != (source.fingerprint, tokenizer.fingerprint):
        raise UserError(f"{folder} was made from other text or another tokenizer: remove it, it is made anew")
    return shards


def open_shards(folder: Path) -> Shards:
    """Shards that exist, their files compared with the manifest. Raises UserError for a damaged one."""
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} has no manifest.json: remove the folder, it is made anew from the text")
    manifest = read_json(folder / "manifest.json")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} has format {manifest['format']}, not {FORMAT}: remove it, it is made anew")
    for split, figures in manifest["splits"].items():
        file = folder / f"{split}.bin"
        size = file.stat().st_size if file.exists() else -1
        whole = size == figures["tokens"] * np.dtype(manifest["dtype"]).itemsize
        if not whole or ("blocks" not in figures and sha256_of(file) != figures["sha256"]):
            raise UserError(f"{file} is damaged (it differs from manifest.json): remove {folder}, it is made anew")
    return Shards(folder, manifest)


def write_shards(folder: Path, source: Source, tokenizer) -> None:
    """Goes on at the position that an earlier process noted in the folder."""
    from nanoghost.data.block_checksums import sums_of

    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    endoftext = tokenizer.special("<|endoftext|>")
    position = folder / "position.json"
    at = read_json(position) if position.exists() else {"document": -1, "character": 0, "splits": NOTHING}
    splits = {split: dict(figures) for split, figures in at["splits"].items()}
    unnoted = 0
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "ab")) for split in SPLITS}
        for split, f in files.items():
            f.truncate(splits[split]["tokens"] * dtype.itemsize)  # more was written than noted
        pieces = pieces_of(source, max(0, at["document"]), at["character"])
        group = True
        while group:
            group = list(islice(pieces, GROUP))
            encoded = tokenizer.encode_batch([text for _, text, _ in group]) if group else []
            for (split, text, begins), ids in zip(group, encoded):
                ids = [endoftext, *ids] if begins else ids
                files[split].write(np.array(ids, dtype).tobytes())
                splits[split]["tokens"] += len(ids)
                splits[split]["bytes"] += len(text.encode())
                splits[split]["documents"] += begins
                at["document"] += begins
                at["character"] = len(text) if begins else at["character"] + len(text)
                unnoted += len(text)
            if unnoted > NOTE or not group:
                for f in files.values():
                    f.flush()
                    os.fsync(f.fileno())
                write_json(position, at | {"splits": splits})
                unnoted = 0
    for split in SPLITS:
        splits[split] |= sums_of(folder / f"{split}.bin", CHECKED_BYTES)
    about = {key: getattr(source, key) for key in ("name", "fingerprint", "license", "attribution")}
    manifest = {"format": FORMAT, "source": about, "tokenizer": tokenizer.fingerprint, "dtype": dtype.str,
                "endoftext": endoftext, "splits": splits}  # fmt: skip
    write_json(folder / "manifest.json", manifest)


def pieces_of(source: Source, skip: int = 0, start: int = 0) -> Iterator[tuple[str, str, bool]]:
    """(split, text, whether a document begins here): the documents, long ones in pieces of about PIECE characters.

    A book in one piece would occupy one core only and gigabytes of the tokenizer's bookkeeping. Leaves out `skip` documents
    and the first `start` characters of the next.
    """
    for document in source.documents(skip):
        while start < len(document.text):
            end = seam(document.text, start + PIECE)
            yield document.split, document.text[start:end], start == 0
            start = end
        start = 0


SEAM = re.compile(r"(?<=\S\n)(?=\S)")


def seam(text: str, after: int) -> int:
    """The first place from `after` on where cutting doesn't change the tokens.

    After a single line end between two visible characters, since pre-tokenizers only ever look ahead over a run of
    white space (GPT-2's `\\s+(?!\\S)`), and none joins a line end to what follows it.
    """
    found = SEAM.search(text, min(after, len(text)))
    return found.start() if found else len(text)
