"""The n-gram baseline: an interpolated, modified Kneser-Ney model over bytes (Chen and Goodman 1999).

A language model that does not beat it has learned nothing but local statistics.
"""

import numpy as np

SEPARATOR = 256  # stands before each text


def kneser_ney_bpb(train_texts: list[str], test_texts: list[str], order: int = 6) -> float:
    """Bits per byte on the test texts of a model of the training texts.

    `order`: length of the longest n-gram, at most 7 bytes (longer ones do not fit into 64 bits). An n-gram is an
    integer (a byte is a digit in base 257), counts are sorted arrays, and look-ups are binary searches.
    """
    train, test = _stream(train_texts), _stream(test_texts)
    probability = np.full(len(test), 1 / 256)
    for n in range(1, order + 1):
        if n < order:  # continuation counts: the number of different bytes before the n-gram, not its frequency
            grams, counts = np.unique(np.unique(_ngrams(train, n + 1)) % 257**n, return_counts=True)
        else:
            grams, counts = np.unique(_ngrams(train, n), return_counts=True)
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(grams // 257, return_index=True)
        totals = np.add.reduceat(counts, first)
        total_discounts = np.add.reduceat(discounts, first)

        queries = _ngrams(test, n)
        gram_index, gram_exists = _find(grams, queries)
        context_index, context_exists = _find(contexts, queries // 257)
        discounted = np.where(gram_exists, counts[gram_index] - discounts[gram_index], 0)
        total = np.where(context_exists, totals[context_index], 1)
        back_off = np.where(context_exists, total_discounts[context_index] / total, 1)
        probability = np.where(context_exists, discounted / total, 0) + back_off * probability
    is_byte = test != SEPARATOR
    return float(-np.log2(probability[is_byte]).mean())


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts of the counts 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26)."""
    n1, n2, n3, n4 = ((counts == i).sum() for i in (1, 2, 3, 4))
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (discounts[1:] > 0).all():
            return discounts
    return np.array([0.0, 0.5, 0.75, 0.9])  # too little text, or too repetitive, to estimate them


def _stream(texts: list[str]) -> np.ndarray:
    """The bytes of all texts, each text after a separator."""
    parts = [np.concatenate([[SEPARATOR], np.frombuffer(t.encode(), np.uint8)]) for t in texts]
    return np.concatenate(parts).astype(np.int64)


def _ngrams(stream: np.ndarray, n: int) -> np.ndarray:
    """The n-gram that ends at each position, as an integer. The stream is padded with separators on the left."""
    padded = np.concatenate([np.full(n - 1, SEPARATOR), stream])
    code = np.zeros(len(stream), np.int64)
    for i in range(n):
        code = code * 257 + padded[i : i + len(stream)]
    return code


def _find(sorted_values: np.ndarray, queries: np.ndarray):
    """(index, whether the value exists) of each query."""
    index = np.minimum(np.searchsorted(sorted_values, queries), len(sorted_values) - 1)
    return index, sorted_values[index] == queries
