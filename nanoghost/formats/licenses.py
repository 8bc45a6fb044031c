"""What must travel with the weights of others."""

import re
import shutil
from pathlib import Path


def copy_licences(source: Path, target: Path, before: str = "", after: str = "") -> None:
    """Licences and notices, from folder to folder; with names that begin otherwise `before` and `after`."""
    for path in source.iterdir():
        name = path.name.removeprefix(before)
        if before + name == path.name and re.fullmatch(r"(?i)(licen[cs]e[-\w]*|notice|copying)(\.txt|\.md)?", name):
            shutil.copyfile(path, target / (after + name))
