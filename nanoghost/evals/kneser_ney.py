"""What counting alone achieves: interpolated, modified Kneser-Ney over bytes (Chen and Goodman 1999), the floor of every table."""

import numpy as np


def kneser_ney_bpb(train_texts: list[str], test_texts: list[str], order: int = 6) -> float:
    """Bits per byte on the test texts after counting the training texts; `order` is the longest n-gram, in bytes.

    N-grams are integers (a byte is a digit of base 257), counts are sorted arrays, look-ups are binary searches.
    """
    train, test = _stream(train_texts), _stream(test_texts)
    probability = np.full(len(test), 1 / 256)
    for n in range(1, order + 1):
        if n < order:  # lower orders count in how many different contexts a gram occurs, not how often
            grams, counts = np.unique(np.unique(_ngrams(train, n + 1)) % 257**n, return_counts=True)
        else:
            grams, counts = np.unique(_ngrams(train, n), return_counts=True)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(grams // 257, return_index=True)
        totals = np.add.reduceat(counts, first)
        withheld = np.add.reduceat(discounts, first)

        queries = _ngrams(test, n)
        gram_at, gram_found = _find(grams, queries)
        context_at, context_found = _find(contexts, queries // 257)
        seen = np.where(gram_found, counts[gram_at] - discounts[gram_at], 0)
        total = np.where(context_found, totals[context_at], 1)
        back_off = np.where(context_found, withheld[context_at] / total, 1)
        probability = np.where(context_found, seen / total, 0) + back_off * probability
    real = test != 256
    return float(-np.log2(probability[real]).mean())


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from a count of 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = ((counts == i).sum() for i in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (discounts[1:] > 0).all():
            return discounts
    return np.array([0.0, 0.5, 0.75, 0.9])  # too little text, or too repetitive, to estimate them


def _stream(texts: list[str]) -> np.ndarray:
    """All bytes, each text after a mark (256)."""
    parts = [np.concatenate([[256], np.frombuffer(t.encode(), np.uint8)]) for t in texts]
    return np.concatenate(parts).astype(np.int64)


def _ngrams(stream: np.ndarray, n: int) -> np.ndarray:
    """The n-gram that ends at each position, as an integer; before the start stand marks."""
    padded = np.concatenate([np.full(n - 1, 256), stream])
    code = np.zeros(len(stream), np.int64)
    for i in range(n):
        code = code * 257 + padded[i : i + len(stream)]
    return code


def _find(sorted_values: np.ndarray, queries: np.ndarray):
    at = np.minimum(np.searchsorted(sorted_values, queries), len(sorted_values) - 1)
    return at, sorted_values[at] == queries
