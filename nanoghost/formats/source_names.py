"""What the model in a file or folder is called."""

import os
import re
from pathlib import Path

from nanoghost.formats.gguf_split import gguf_stem

HUB_SNAPSHOT = re.compile(r".*/models--(?:.*--)?(?P<name>[^/]+)/snapshots/[^/]+")
"""A model's folder in the cache of the Hub is called by its commit; the name is two folders above."""


def source_name(source: Path) -> str:
    """From the path itself: a link is called as its owner called it, not by what it leads to."""
    path = Path(os.path.abspath(source))
    if path.is_file():
        return gguf_stem(path)
    snapshot = HUB_SNAPSHOT.fullmatch(str(path))
    return snapshot["name"] if snapshot else path.name
