"""`nanoghost data`: fetch, check and tokenise text, and say what is there."""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.data.batches import Batches
from nanoghost.data.shards import tokenise, tokenizer_for
from nanoghost.data.sources import open_source


@dataclass(frozen=True)
class DataSettings:
    data: Annotated[str, tyro.conf.Positional] = "plays"
    """plays, a file or folder (.txt .md .jsonl .parquet), or hub:OWNER/NAME."""
    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    context: int = 256
    """Tokens in a row, to measure the loader."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: DataSettings) -> None:
    console = Console(stderr=True)
    source = open_source(settings.data)
    tokenizer = tokenizer_for(source, settings.vocab_size, console.print)
    shards = tokenise(source, tokenizer)
    batches = Batches(shards.tokens("train"), settings.context, 16, seed=0)
    start = time.perf_counter()
    for step in range(50):
        batches.at(step)
    milliseconds = (time.perf_counter() - start) / 50 * 1000
    splits = shards.manifest["splits"]
    if settings.json:
        figures = {"name": source.name, "licence": source.licence, "splits": splits, "batch_milliseconds": milliseconds}
        print(json.dumps(figures | {"vocab_size": tokenizer.vocab_size}))
        return
    table = Table("split", "documents", "bytes", "tokens", "bytes per token", title=f"{source.name} ({source.licence})")
    for name, s in splits.items():
        ratio = f"{s['bytes'] / s['tokens']:.2f}" if s["tokens"] else ""
        table.add_row(name, f"{s['documents']:,}", f"{s['bytes']:,}", f"{s['tokens']:,}", ratio)
    console.print(table)
    console.print(
        f"{source.attribution}\na batch of 16 x {settings.context} tokens takes {milliseconds:.2f} ms; in {shards.folder}"
    )
