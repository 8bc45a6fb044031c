"""Mixtures of sources: `--data plays=0.7,./notes=0.3` takes 7 of 10 rows from the plays, however large the sources are.

mix_sources makes one source of several. mixed_batches.py draws the batches from the tokens by weight.
"""

import re
from collections.abc import Iterator
from itertools import chain, islice

from nanoghost.data.mixed_batches import BLOCK
from nanoghost.data.sources import Document, Source, fingerprint, folder_name
from nanoghost.errors import UserError


def is_mixture(spec: str) -> bool:
    return all(re.fullmatch(r".+=[0-9.]+", part) for part in spec.split(","))


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """[(source, weight), ...] of "SOURCE=WEIGHT,SOURCE=WEIGHT,..."."""
    parts = []
    for part in spec.split(","):
        name, _, weight = part.rpartition("=")
        parts.append((name, float(weight)))
    names = {name for name, _ in parts}
    weights = [weight for _, weight in parts]
    if len(parts) < 2 or len(names) < len(parts):
        raise UserError(f"'{spec}' is not a mixture: name two or more different sources, as in plays=0.7,./notes=0.3")
    if not min(weights) * BLOCK >= sum(weights) > 0:
        raise UserError(f"'{spec}': every weight must be at least a thousandth of their sum")
    return parts


def mix_sources(parts: list[tuple[Source, float]]) -> Source:
    total = sum(weight for _, weight in parts)

    def documents(skip: int = 0) -> Iterator[Document]:
        return islice(chain.from_iterable(source.documents() for source, _ in parts), skip, None)

    return Source(
        name=folder_name("-".join(source.name for source, _ in parts)),
        license="; ".join(dict.fromkeys(source.license for source, _ in parts)),
        attribution="; ".join(f"{weight / total:.1%} {source.attribution}" for source, weight in parts),
        fingerprint=fingerprint((str(weight / total), bytes.fromhex(source.fingerprint)) for source, weight in parts),
        documents=documents,
        parts=tuple(parts),
    )
