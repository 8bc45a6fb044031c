"""Byte-pair encoding: the whole algorithm in readable form, the reference that `Tokenizer` is compared with."""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import inf

import regex
import tokenizers
from tokenizers import normalizers

from nanoghost.tokenizer.tokenizer import BYTE_ORDER, FIRST_BYTE, FIRST_MERGE, PATTERN, SPECIAL_TOKENS

Pair = tuple[int, int]  # ids of two adjacent tokens


def reference_split(text: str) -> list[bytes]:
    """The words of a text as UTF-8. Joined, they are the text."""
    # `regex` and the tokenizers library have tables of different Unicode versions. A character that is too new for the
    # library is not a letter for it, so it is replaced here by a code point that is never assigned.
    same_age = normalizers.Replace(tokenizers.Regex(r"\p{Cn}"), "\uffff").normalize_str(text)
    return [text[m.start() : m.end()].encode() for m in regex.finditer(PATTERN, same_age)]


def reference_train(texts: Iterable[str], vocab_size: int) -> list[Pair]:
    """The merges learned from texts, in order."""
    return reference_merges(Counter(word for text in texts for word in reference_split(text)), vocab_size)


def reference_merges(words: Mapping[bytes, int], vocab_size: int) -> list[Pair]:
    """The merges learned from words and their counts: always the most frequent pair; in a tie, the smallest ids.

    It ends before `vocab_size` when no pair occurs twice.
    """
    spellings = [[FIRST_BYTE + BYTE_ORDER.index(b) for b in word] for word in words]
    times = list(words.values())
    counts: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(
        set
    )  # pair -> words that may contain it: a merge visits only these
    for i, spelling in enumerate(spellings):
        for pair in pairwise(spelling):
            counts[pair] += times[i]
            places[pair].add(i)

    merges: list[Pair] = []
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    while queue and FIRST_MERGE + len(merges) < vocab_size:
        minus_count, pair = heapq.heappop(queue)
        if -minus_count != counts[pair]:
            continue  # an outdated count; the current one is also in the queue
        if counts[pair] < 2:
            break
        new = FIRST_MERGE + len(merges)
        merges.append(pair)
        change: Counter[Pair] = Counter()
        for i in places.pop(pair):
            before, after = spellings[i], _replace(spellings[i], pair, new)
            spellings[i] = after
            for p in pairwise(before):
                change[p] -= times[i]
            for p in pairwise(after):
                change[p] += times[i]
                places[p].add(i)
        for p in change:
            if change[p]:
                counts[p] += change[p]
                heapq.heappush(queue, (-counts[p], p))
    return merges


def _replace(ids: list[int], pair: Pair, new: int) -> list[int]:
    """Replace each occurrence of the pair by the new id, from left to right: aaa becomes (aa)a."""
    replaced, i = [], 0
    while i < len(ids):
        is_match = tuple(ids[i : i + 2]) == pair
        replaced.append(new if is_match else ids[i])
        i += 2 if is_match else 1
    return replaced


def reference_encode(text: str, merges: Sequence[Pair]) -> list[int]:
    """The ids of a text."""
    return reference_encode_words(reference_split(text), merges)


def reference_encode_words(words: Iterable[bytes], merges: Sequence[Pair]) -> list[int]:
    """The ids of words of any bytes: merges are applied in the order in which they were learned."""
    ids_of_pairs = {pair: FIRST_MERGE + i for i, pair in enumerate(merges)}
    encoded = []
    for word in words:
        ids = [FIRST_BYTE + BYTE_ORDER.index(b) for b in word]
        while len(ids) > 1:
            first = min(pairwise(ids), key=lambda pair: ids_of_pairs.get(pair, inf))
            if first not in ids_of_pairs:
                break
            ids = _replace(ids, first, ids_of_pairs[first])
        encoded += ids
    return encoded


def reference_tokens(merges: Sequence[Pair]) -> list[bytes]:
    """The bytes of each id; empty for special tokens."""
    tokens = [b""] * len(SPECIAL_TOKENS) + [bytes([b]) for b in BYTE_ORDER]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def reference_decode(ids: Iterable[int], merges: Sequence[Pair]) -> bytes:
    """The bytes of a list of ids."""
    tokens = reference_tokens(merges)
    return b"".join(tokens[i] for i in ids)
