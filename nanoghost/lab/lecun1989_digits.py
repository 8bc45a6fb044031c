"""Handwritten digits, 16 x 16 pixels from -1 to 1: scikit-learn's, or MNIST from its own files; and their folds."""

import gzip
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from nanoghost.errors import UserError

FOLDS = 5
TRAIN_DIGITS, TEST_DIGITS = 7291, 2007  # of MNIST: as many as the paper had


def bundled_digits():
    """(digits, labels): scikit-learn's 1,797 digits of 8 x 8 (UCI Optical Recognition of Handwritten Digits)."""
    if not importlib.util.find_spec("sklearn"):
        raise UserError("scikit-learn, which contains the digits, is not installed: pip install 'nanoghost[lab]'")
    from sklearn.datasets import load_digits

    data = load_digits()
    return resized(torch.tensor(data.images, dtype=torch.float32) / 16), torch.tensor(data.target)


def mnist_digits(folder: Path):
    """(digits, labels, index of the first test digit) from the four files of MNIST, compressed or not."""
    generator = torch.Generator().manual_seed(1337)
    parts = []
    for part, count in (("train", TRAIN_DIGITS), ("t10k", TEST_DIGITS)):
        images = read_idx(folder, f"{part}-images-idx3-ubyte")
        labels = read_idx(folder, f"{part}-labels-idx1-ubyte")
        sample = torch.randperm(len(images), generator=generator)[:count]
        parts.append((resized(images[sample].float() / 255), labels[sample].long()))
    (train_digits, train_labels), (test_digits, test_labels) = parts
    digits, labels = torch.cat([train_digits, test_digits]), torch.cat([train_labels, test_labels])
    return digits, labels, len(train_digits)


def read_idx(folder: Path, name: str) -> torch.Tensor:
    """A file in MNIST's IDX format: magic number, sizes, bytes."""
    path = next((folder / f for f in (name, f"{name}.gz") if (folder / f).exists()), None)
    if path is None:
        raise UserError(f"--mnist: {folder} has no {name} (or {name}.gz); it must contain the four files of MNIST")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    header = 4 + 4 * len(sizes)
    if data[:3] != b"\0\0\x08" or len(data) != header + math.prod(sizes):
        raise UserError(f"{path} is not in MNIST's format")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(sizes)


def resized(images_NHW):
    """(N, H, W) from 0 to 1 -> (N, 16, 16) from -1 to 1."""
    return F.interpolate(images_NHW[:, None], size=(16, 16), mode="bilinear", antialias=True)[:, 0] * 2 - 1


def folds(count: int, first_test: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(training indices, test indices) of each fold; one fold if there is a test set, which begins at `first_test`."""
    if first_test is not None:
        return [(torch.arange(first_test), torch.arange(first_test, count))]
    parts = torch.randperm(count, generator=torch.Generator().manual_seed(0)).chunk(FOLDS)
    return [(torch.cat([part for part in parts if part is not test]), test) for test in parts]
