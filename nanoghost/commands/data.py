"""`nanoghost data`: fetch, check and tokenize text, and print figures about it."""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Source
from nanoghost.data.token_dataset import TokenDataset
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.progress import JsonFlag
from nanoghost.tasks.sft_mix import example_texts

BATCH_ROWS = 16  # of the batches that are timed


@dataclass(frozen=True)
class DataSettings(JsonFlag):
    data: Annotated[str, tyro.conf.Positional] = "plays"
    """plays, a file or folder (.txt .md .json .jsonl .parquet), hub:OWNER/NAME, a URL, refined data, or A=0.7,B=0.3."""
    vocab_size: int = 4096
    """Size of the tokenizer's vocabulary."""
    context: int = 256
    """Tokens in each row of the batches that are timed."""


def command(settings: DataSettings) -> None:
    console = Console(stderr=True, markup=False, highlight=False)  # a file may be called notes[1].txt
    source = open_data_source(settings.data)
    tokenizer = load_or_train_tokenizer(source, settings.vocab_size, console.print, example_texts())
    dataset = tokenize_source(source, tokenizer)
    train_tokens = dataset.tokens("train")
    milliseconds = None
    if len(train_tokens) > settings.context:
        milliseconds = batch_milliseconds(train_tokens, settings.context)
    if settings.json:
        figures = {
            "name": source.name,
            "license": source.license,
            "attribution": source.attribution,
            "splits": dataset.manifest["splits"],
            "batch_milliseconds": milliseconds,
            "vocab_size": tokenizer.vocab_size,
        }
        print(json.dumps(figures))
        return
    console.print(splits_table(source, dataset))
    console.print(f"{source.attribution}\nin {dataset.folder}", soft_wrap=True)
    if milliseconds is None:
        console.print(f"the text is too short for a training row of {settings.context} + 1 tokens")
    else:
        console.print(f"a batch of {BATCH_ROWS} x {settings.context} tokens takes {milliseconds:.2f} ms")


def splits_table(source: Source, dataset: TokenDataset) -> Table:
    table = Table("split", "documents", "bytes", "tokens", "bytes per token", title=f"{source.name} ({source.license})")
    for name, split in dataset.manifest["splits"].items():
        bytes_per_token = f"{split['bytes'] / split['tokens']:.2f}" if split["tokens"] else ""
        counts = (f"{split[key]:,}" for key in ("documents", "bytes", "tokens"))
        table.add_row(name, *counts, bytes_per_token)
    return table


def batch_milliseconds(tokens: np.ndarray, context: int, num_batches: int = 50) -> float:
    """Mean time to load a batch of BATCH_ROWS rows."""
    loader = Batches(tokens, context, BATCH_ROWS, seed=0)
    start = time.perf_counter()
    for step in range(num_batches):
        loader.at(step)
    return (time.perf_counter() - start) / num_batches * 1000
