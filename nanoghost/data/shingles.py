"""Shingles (word n-grams) that do not depend on spelling: of words without vowels and double letters.

The First Folio prints "haue", "loue", "vpon", "Ile goe" where a modern edition has "have", "love", "upon", "I'll go",
so the editions have few word 5-grams in common. Without vowels, and with v, j and y written as u and i, they have most
in common (docs/results/data.md has the figures).

N words of a text.
"""

import hashlib
import re
import unicodedata
from functools import lru_cache

import numpy as np

WORD = re.compile(r"[^\W\u3040-\u9fff\uac00-\ud7af]+|[\u3040-\u9fff\uac00-\ud7af]")
"""A run of letters and digits; a single character of Chinese, Japanese and Korean, which are written without spaces."""
OLD_LETTERS = str.maketrans("vjy", "uii")
MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: an odd constant that mixes bits (Knuth, 6.4)


def word_hashes(text: str) -> np.ndarray:
    """A 64-bit hash of each word, the same for all its spellings and on every machine: uint64 (N,)."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return np.fromiter(map(word_hash, WORD.findall(text.lower().replace("'", ""))), np.uint64)


@lru_cache(2**17)
def word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(skeleton(word).encode(), digest_size=8).digest(), "little")


def skeleton(word: str) -> str:
    """The first letter and the consonants after it: upon and vpon are upn, goe and go are g."""
    word = re.sub(r"(.)\1+", r"\1", word.translate(OLD_LETTERS)) if word.isalpha() else word
    return word[0] + re.sub("[aeiou]", "", word[1:])


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each n words in a row: uint64 (max(0, N - n + 1),)."""
    total = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n):
        total = total * MIX + hashes[i : i + len(total)]  # modulo 2^64
        total ^= total >> np.uint64(29)
    return total


def contains_any(shingles: np.ndarray, index: np.ndarray) -> bool:
    """Whether any of the shingles is in `index`, which is sorted and not empty."""
    indices = np.searchsorted(index, shingles)
    indices = np.minimum(indices, len(index) - 1)
    return bool((index[indices] == shingles).any())
