"""Handwritten digits for `nanoghost lab lecun1989`, from scikit-learn or from the files of MNIST, and their folds.

Digits are float32 (N, 16, 16), from -1 (background) to 1; labels are int64 (N,).
"""

import gzip
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from nanoghost.errors import UserError

FOLDS = 5
TRAIN_DIGITS, TEST_DIGITS = 7291, 2007  # of MNIST: as many as in the paper

Fold = tuple[torch.Tensor, torch.Tensor]
"""(training indices, test indices)"""


def bundled_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """(digits, labels): scikit-learn's 1,797 digits of 8 x 8 (UCI Optical Recognition of Handwritten Digits)."""
    if not importlib.util.find_spec("sklearn"):
        raise UserError("scikit-learn, which contains the digits, is not installed: pip install 'nanoghost[lab]'")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return resize(images), torch.tensor(data.target)


def mnist_digits(folder: Path) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(digits, labels, index of the first test digit) from the four files of MNIST, compressed or not.

    Raises UserError if a file is missing or damaged.
    """
    generator = torch.Generator().manual_seed(1337)
    parts = []
    for part, count in (("train", TRAIN_DIGITS), ("t10k", TEST_DIGITS)):
        images = read_idx(folder, f"{part}-images-idx3-ubyte")
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
        sample = torch.randperm(len(images), generator=generator)[:count]
        parts.append((resize(images[sample].float() / 255), labels[sample].long()))
    (train_digits, train_labels), (test_digits, test_labels) = parts
    digits, labels = torch.cat([train_digits, test_digits]), torch.cat([train_labels, test_labels])
    return digits, labels, len(train_digits)


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """A file in MNIST's IDX format: magic number, sizes, bytes."""
    path, compressed_path = folder / name, folder / f"{name}.gz"
    if path.exists():
        data = path.read_bytes()
    elif compressed_path.exists():
        path = compressed_path
        data = gzip.decompress(path.read_bytes())
    else:
        raise UserError(f"--mnist: {folder} has no {name} (or {name}.gz); it must contain the four files of MNIST")
    error = f"{path} is not in MNIST's format"
    if len(data) < 4 or data[:3] != b"\0\0\x08":  # 8: the elements are bytes
        raise UserError(error)
    dimensions = data[3]
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    header = 4 + 4 * dimensions
    if len(data) != header + math.prod(sizes):
        raise UserError(error)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(sizes)


def resize(images_NHW):
    """Images (N, H, W) from 0 to 1 -> digits (N, 16, 16) from -1 to 1."""
    return F.interpolate(images_NHW[:, None], size=(16, 16), mode="bilinear", antialias=True)[:, 0] * 2 - 1


def folds(count: int, first_test: int | None = None) -> list[Fold]:
    """FOLDS folds of random digits; or one fold if there is a test set, which begins at index `first_test`."""
    if first_test is not None:
        return [(torch.arange(first_test), torch.arange(first_test, count))]
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(FOLDS)
    return [(torch.cat([part for part in parts if part is not test]), test) for test in parts]
