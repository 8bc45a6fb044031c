"""An index of the text that models are evaluated on, so that training text which contains it can be dropped.

A document is contaminated if it shares 13 words in a row with the evaluation, as in GPT-3 (Brown et al. 2020,
appendix C). Shorter problems count as a whole; below 8 words they cannot be told from ordinary text.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanoghost.data.registry import open_data_source
from nanoghost.data.shingles import shingles, word_hashes
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import write_json
from nanoghost.tasks.base import distinct_problems
from nanoghost.tasks.registry import all_tasks
from nanoghost.tokenizer.chat_format import text_of

PROBLEMS = 500
"""Held-out problems of each task; `nanoghost eval` uses as many."""
NGRAM_WORDS = 13
MIN_WORDS = 8


def build_index(names: str, file: Path) -> None:
    """Write the n-grams (shingles) of held-out texts as arrays "NAME:N", and counts of the texts to a .json file."""
    if file.exists():
        return
    arrays, counts = defaultdict(list), {}
    for name in names.split(",") if names != "none" else []:
        counts[name] = {"texts": 0, "too_short": 0}
        for text in held_out_texts(name):
            counts[name]["texts"] += 1
            hashes = word_hashes(text)
            n = min(NGRAM_WORDS, len(hashes))
            if n < MIN_WORDS:
                counts[name]["too_short"] += 1
            else:
                arrays[f"{name}:{n}"].append(shingles(hashes, n))
    write_json(file.with_suffix(".json"), counts)
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as f:
        np.savez(f, **{key: np.unique(np.concatenate(hash_arrays)) for key, hash_arrays in arrays.items()})
    partial.replace(file)


def held_out_texts(name: str) -> Iterator[str]:
    """Held-out problems of all tasks ("tasks"), held-out plays ("plays"), or all documents of another source."""
    if name == "tasks":
        # The card of an adopted model: no facts about pretraining, and words to spell from the dictionary alone
        card = ModelCard(name="ghost", stage="adopt", parameters=1)
        for task in all_tasks(card, "ghost").values():
            for problem in distinct_problems(task, PROBLEMS):
                yield "\n".join(text_of(message) for message in problem.messages)
        return
    for document in open_data_source(name).documents():
        if name != "plays" or document.split != "train":
            yield document.text
