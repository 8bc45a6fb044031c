"""Download an archive from the Python package index that pip is set up to use."""

import subprocess
import sys
from pathlib import Path

from nanoghost.errors import UserError


def pip_download(
    requirement: str, sha256: str, folder: Path, *, description: str, remedy: str, options: tuple[str, ...] = ()
) -> None:
    """Download one archive into `folder`. pip compares its SHA-256 before it looks inside.

    `description` is what the user sees, `remedy` what the error message suggests.
    """
    print(f"downloading {description} ...", file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *options]
    command += ["--require-hashes", "-r", str(requirements), "-d", str(folder)]
    result = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    if result.returncode:
        reason = (result.stderr.strip() or "no error message").split("\n")[-1]
        name = description.partition(" (")[0]
        raise UserError(f"pip could not download {name} ({reason}): {remedy}")
