"""Settings of `nanoghost data refine`, without datatrove: --help works when it is not installed."""

import os
import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost.errors import UserError
from nanoghost.progress import JsonFlag

RESERVED_NAMES = ("plays", "tokenizers", "cache")
MAX_HASHES = 256
"""Maximum number of MinHash values of a document."""


@dataclass(frozen=True)
class RefineSettings(JsonFlag):
    data: Annotated[str, tyro.conf.Positional]
    """Text to refine: everything that `nanoghost data` reads."""
    name: str
    """Name of the output, for --data NAME."""
    similarity: float = 0.5
    """Jaccard similarity (three-word sequences, spelling ignored) from which two documents are near duplicates."""
    quality: str = "gopher"
    """gopher: drop what the rules of Gopher (Rae et al. 2021) do not accept as prose; none: no quality filter."""
    decontaminate: str = "plays,tasks"
    """Evaluation text to remove, comma-separated: plays (held-out ones), tasks (held-out problems), files; or none."""
    workers: int = os.cpu_count() or 1
    """Number of processes. The output does not depend on it."""


def check_settings(settings: RefineSettings) -> None:
    valid_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", settings.name)
    if not valid_name or settings.name in RESERVED_NAMES:
        raise UserError(f"--name cannot be '{settings.name}': use letters, digits, '.', '_' and '-'")
    if not 0.2 <= settings.similarity <= 0.95:
        raise UserError(f"--similarity must be between 0.2 and 0.95, not {settings.similarity:g}")
    if settings.quality not in ("gopher", "none"):
        raise UserError(f"--quality must be gopher or none, not '{settings.quality}'")
    if settings.workers < 1:
        raise UserError(f"--workers must be at least 1, not {settings.workers}")


def minhash_bands(similarity: float) -> tuple[int, int]:
    """(bands, rows) with which two documents of that Jaccard similarity are found about two times in three.

    A band of r rows agrees with probability s^r; with b = s^-r bands, none agrees with probability 1/e (Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4). More rows give a steeper curve; MAX_HASHES limits them.
    """
    possible = [1]
    for rows in range(2, MAX_HASHES):
        if rows * round(similarity**-rows) <= MAX_HASHES:
            possible.append(rows)
    rows = max(possible)
    return round(similarity**-rows), rows
