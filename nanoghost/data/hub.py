"""Data sets of the Hub, streamed."""

import re
import sys

from nanoghost.data.local import row_text, split_texts
from nanoghost.data.sources import Source, fingerprint, folder_name
from nanoghost.errors import UserError

HUB_BYTES = 1_000_000_000
"""Take at most this much text: many sets hold more than any disk (FineWeb-Edu: terabytes)."""

NON_COMMERCIAL = {"climbmix": "CC BY-NC 4.0"}
"""Sets whose licence forbids commercial use, by a part of their name (copies don't always carry the licence over)."""


def open_hub(spec: str, max_bytes: int = HUB_BYTES) -> Source:
    """A Hub data set by "hub:owner/name[:config]", its training rows streamed, pinned to today's revision."""
    name, _, config = spec.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"'{spec}' is not a Hub data set: write hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UserError("data from the Hub needs an extra: pip install 'nanoghost[hub]'") from None
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=30)
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True, revision=info.sha)
    except Exception as error:  # an edge: two libraries, three HTTP clients and their versions each raise their own
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read '{name}' from the Hub (is the name right, is there a network?): {why}") from error
    licence = str((info.card_data or {}).get("license") or "unknown")
    licence = next((known for part, known in NON_COMMERCIAL.items() if part in name.lower()), licence)
    if re.search(r"\bnc\b", licence, re.IGNORECASE):
        print(f"warning: {name} is {licence}: models made from it may not be used commercially", file=sys.stderr)

    def texts():
        total = 0
        for number, row in enumerate(rows, start=1):
            text = row_text(row, f"{name}, row {number}")
            total += len(text.encode())
            if total > max_bytes:
                return
            yield f"{name}:{number}", text

    return Source(
        name=folder_name(name.replace("/", "--") + ("-" + config if config else "")),
        licence=licence,
        attribution=f"https://huggingface.co/datasets/{name} at revision {info.sha}",
        fingerprint=fingerprint([(spec, f"{info.sha} {max_bytes}".encode())]),  # the revision stands for the contents
        documents=lambda: split_texts(texts(), empty=f"{spec}: there is no text in it"),
    )
