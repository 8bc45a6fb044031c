"""Shingles: the same for First Folio and modern spelling, different for different words."""

import random

import numpy as np

from nanoghost.data.shingles import contains_any, shingles, skeleton, word_hashes


def test_spellings_of_a_word_have_the_same_hash():
    for pair in (
        "have haue",
        "upon vpon",
        "justice iustice",
        "go goe",
        "love loue",
        "eyes eies",
        "dog dogge",
        "cafe café",
    ):
        modern, folio = map(word_hashes, pair.split())
        assert (modern == folio).all(), pair
    assert len({skeleton(w) for w in "king queen sword ghost 1623 1632 22 2".split()}) == 8
    assert len(word_hashes("It's one's, well-known: 漢字!")) == 6
    assert len(word_hashes("")) == 0
    assert len(shingles(word_hashes("one two"), 3)) == 0


def test_shingles_are_equal_exactly_if_the_words_are():
    rng = random.Random(0)
    words = [rng.choice("ab cd ef gh 1 2".split()) for _ in range(300)]
    for n in (1, 2, 3, 5):
        hashes = shingles(word_hashes(" ".join(words)), n)
        sequences = [tuple(words[i : i + n]) for i in range(300 - n + 1)]
        assert len(hashes) == len(sequences)
        assert len(set(hashes.tolist())) == len(set(sequences))
        index = np.unique(hashes[:50])
        for i in range(len(hashes)):
            assert contains_any(hashes[i : i + 1], index) == (sequences[i] in sequences[:50])
