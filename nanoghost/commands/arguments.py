"""Lists on the command line: numbers or words with commas between."""

from nanoghost.errors import UserError


def numbers(flag: str, text: str, least: float = 1, kind=int) -> list:
    """The numbers, each at least `least`. Raises UserError."""
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(n >= least for n in found):
        raise UserError(f"{flag} takes numbers from {least:g} up with commas between, not '{text}'")
    return found


def matching(text: str, names) -> list[str]:
    """Those of `names` that have one of the words in them; all, if there is no word. Raises UserError if none has."""
    words = [word.strip().casefold() for word in text.split(",") if word.strip()]
    found = [name for name in names if not words or any(word in name.casefold() for word in words)]
    if not found:
        raise UserError(f"'{text}' names none of: {'; '.join(names)}")
    return found
