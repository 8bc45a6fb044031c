"""What a file is that was taken for another one: recognized by its first bytes, for the error message."""

import re
from pathlib import Path

from nanoghost.errors import UserError

KINDS = (  # the beginning of a file -> what it is, and the remedy
    (
        re.compile(rb"version https://git-lfs"),
        "it is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
    ),
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "it is a web page, not the file itself: download it again"),
    (
        re.compile(rb"PK\x03\x04|\x80[\x02-\x05]"),
        "it is a zip archive or a pickle of PyTorch, which could run any program:"
        " adopt the model's safetensors or GGUF files instead",
    ),
)


def check_content(path: Path) -> None:
    """Raise UserError for a file that only has the name of a model's file."""
    with open(path, "rb") as f:
        head = f.read(64)
    for pattern, reason in KINDS:
        if pattern.match(head):
            raise UserError(f"cannot read {path}: {reason}")
