"""Shingles that do not depend on spelling: the same for First Folio and modern spelling, different for different words."""

import random

import numpy as np

from nanoghost.data.shingles import contains_any, shingles, skeleton, word_hashes


def test_spellings_of_a_word_are_one_and_words_are_not():
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
    assert len(word_hashes("")) == 0 and len(shingles(word_hashes("one two"), 3)) == 0


def test_shingles_are_the_sets_of_word_sequences():
    rng = random.Random(0)
    words = [rng.choice("ab cd ef gh 1 2".split()) for _ in range(300)]
    for n in (1, 2, 3, 5):
        found = shingles(word_hashes(" ".join(words)), n)
        sequences = [tuple(words[i : i + n]) for i in range(300 - n + 1)]
        assert len(found) == len(sequences) and len(set(found.tolist())) == len(set(sequences))
        known = np.unique(found[:50])
        for i in range(len(found)):
            assert contains_any(found[i : i + 1], known) == (sequences[i] in sequences[:50])
