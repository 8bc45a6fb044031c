"""Phrasings of questions and answers: templates from phrases/*.toml, and variations of them."""

import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path


@cache
def load_phrases(name: str) -> dict:
    """The content of phrases/`name`.toml in its order. Lists become tuples, since all callers share the result."""
    path = Path(__file__).with_name("phrases") / f"{name}.toml"
    return _immutable(tomllib.loads(path.read_text(encoding="utf-8")))


def _immutable(value):
    if isinstance(value, dict):
        return {key: _immutable(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


OPENERS = ("Please: ", "Tell me: ", "A question: ", "Hello. ", "Hi! ", "Good day. ", "One more thing: ")


def choose_template(rng: random.Random, templates: Sequence[str], split: str) -> str:
    """Choose a template, and sometimes vary it as people type: all lower case, no final punctuation, words before it.

    The slots are filled afterwards, so that the content stays as it is.
    """
    template = rng.choice(templates)
    if split == "train" and template.endswith("?") and rng.random() < 0.08:
        template = rng.choice(OPENERS) + template
    if rng.random() < 0.12:
        template = template.lower()
    if rng.random() < 0.12:
        template = template.rstrip("?.!")
    return template


TEMPLATE_WORD = r"(?<![{\w'])[A-Za-z']+(?![}\w'])"  # not a slot
WORD_SOURCES = ("identity", "refusal", "spelling", "arithmetic")


@cache
def template_words() -> tuple[str, ...]:
    """All words of the train phrasings in WORD_SOURCES, sorted."""
    words = set()
    for name in WORD_SOURCES:
        for text in _train_texts(load_phrases(name)):
            words.update(word.lower() for word in re.findall(TEMPLATE_WORD, text))
    return tuple(sorted(words))


def _train_texts(value) -> Iterator[str]:
    """All texts in a nested value, except those under the key "test"."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key != "test":
                yield from _train_texts(inner)
    else:
        for inner in value:
            yield from _train_texts(inner)


def replace_words(rng: random.Random, template: str, fraction: float) -> str:
    """The template with a fraction of its words replaced by words of other templates or by made-up ones.

    A user's phrasing may contain any word. If the slots say what is wanted, no other word should matter.
    """

    def replacement(match: re.Match) -> str:
        if rng.random() >= fraction:
            return match[0]
        word = rng.choice((made_up_word(rng), rng.choice(template_words())))
        return word.capitalize() if match[0][0].isupper() else word

    return re.sub(TEMPLATE_WORD, replacement, template)


def made_up_word(rng: random.Random) -> str:
    syllables = []
    for _ in range(2):
        syllables += [rng.choice("bcdfghklmnprstvw"), rng.choice("aeiou"), rng.choice(("", "n", "r", "ck"))]
    return "".join(syllables)


def normalize(text: str) -> str:
    """A text without case and punctuation, to compare phrasings."""
    return " ".join(re.findall(r"[a-z0-9{}]+", text.lower().replace("'", "")))
