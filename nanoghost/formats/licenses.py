"""Copy license files: licenses require that they travel with the weights."""

import re
import shutil
from pathlib import Path

# Both spellings occur in file names.
LICENSE_FILE = re.compile(r"(?i)(licen[cs]e[-\w]*|notice|copying)(\.txt|\.md)?")


def copy_license_files(source: Path, target: Path, strip_prefix: str = "", add_prefix: str = "") -> None:
    """Copy licenses and notices from one folder to another.

    `strip_prefix`: only files whose name has this prefix, copied without it. `add_prefix`: prepended to the new names.
    """
    for path in source.iterdir():
        name = path.name.removeprefix(strip_prefix)
        if path.name == strip_prefix + name and LICENSE_FILE.fullmatch(name):
            shutil.copyfile(path, target / (add_prefix + name))
