"""`nanoghost data`: fetch, check and tokenize text, and say what is there."""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.tasks.sft_mix import example_texts


@dataclass(frozen=True)
class DataSettings:
    data: Annotated[str, tyro.conf.Positional] = "plays"
    """plays, a file or folder (.txt .md .jsonl .parquet), hub:OWNER/NAME, a URL, refined data, or NAME=0.7,NAME=0.3."""
    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    context: int = 256
    """Tokens in a row, to measure the loader."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: DataSettings) -> None:
    console = Console(stderr=True, markup=False, highlight=False)  # a file may be called notes[1].txt
    source = open_source(settings.data)
    tokenizer = load_or_train_tokenizer(source, settings.vocab_size, console.print, example_texts())
    shards = tokenize_source(source, tokenizer)
    train = shards.tokens("train")
    milliseconds = batch_milliseconds(train, settings.context) if len(train) > settings.context else None
    splits = shards.manifest["splits"]
    if settings.json:
        figures = {"name": source.name, "license": source.license, "attribution": source.attribution, "splits": splits,
                   "batch_milliseconds": milliseconds}  # fmt: skip
        print(json.dumps(figures | {"vocab_size": tokenizer.vocab_size}))
        return
    table = Table("split", "documents", "bytes", "tokens", "bytes per token", title=f"{source.name} ({source.license})")
    for name, s in splits.items():
        ratio = f"{s['bytes'] / s['tokens']:.2f}" if s["tokens"] else ""
        table.add_row(name, f"{s['documents']:,}", f"{s['bytes']:,}", f"{s['tokens']:,}", ratio)
    console.print(table)
    console.print(f"{source.attribution}\nin {shards.folder}", soft_wrap=True)
    if milliseconds is None:
        console.print(f"too short for a training row of {settings.context} + 1 tokens: give it more text")
    else:
        console.print(f"a batch of 16 x {settings.context} tokens takes {milliseconds:.2f} ms")


def batch_milliseconds(tokens: np.ndarray, context: int, batches: int = 50) -> float:
    """How long the loader takes for a batch of 16 rows."""
    loader = Batches(tokens, context, 16, seed=0)
    start = time.perf_counter()
    for step in range(batches):
        loader.at(step)
    return (time.perf_counter() - start) / batches * 1000
