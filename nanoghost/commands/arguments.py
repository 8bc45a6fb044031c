"""Command-line arguments that many commands share: the model, and comma-separated lists.

The flag `--json` is `progress.JsonFlag`, because training stages have it too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost.errors import UserError


@dataclass(frozen=True)
class ModelArgument:
    """Settings of a command that uses one finished model: `nanoghost COMMAND [MODEL]`."""

    model: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="(default: the model finished last)"),
    ] = None
    """Name of the model."""


def parse_numbers(flag: str, text: str, minimum: float = 1, number_type: type = int) -> list:
    """Parse comma-separated numbers. Raises UserError unless each is at least `minimum`."""
    try:
        numbers = [number_type(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(number >= minimum for number in numbers):
        raise UserError(f"{flag} expects comma-separated numbers >= {minimum:g}, not '{text}'")
    return numbers


def select_names(flag: str, text: str, names: Iterable[str]) -> list[str]:
    """The names that contain one of the comma-separated words, in any case; all names if there is no word.

    Raises UserError if no name matches.
    """
    words = [word.strip().casefold() for word in text.split(",") if word.strip()]
    names = list(names)
    if not words:
        return names
    selected = [name for name in names if any(word in name.casefold() for word in words)]
    if not selected:
        raise UserError(f"{flag}: '{text}' matches none of: {'; '.join(names)}")
    return selected
