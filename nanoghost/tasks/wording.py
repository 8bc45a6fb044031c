"""Phrasings of questions and answers: templates from phrases/*.toml, and variations of them.

phrases/people/*.toml are what people of different kinds type, one writer a file. `[a|b]` in a line stands for a or
b, so a line is a family of phrasings; 1 family in 8 is held out whole.
"""

import random
import re
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, product
from pathlib import Path

from nanoghost.tasks.base import split_of


@cache
def load_phrases(name: str) -> dict:
    """The content of phrases/`name`.toml in its order. Lists become tuples, since all callers share the result."""
    path = Path(__file__).with_name("phrases") / f"{name}.toml"
    return _immutable(tomllib.loads(path.read_text(encoding="utf-8")))


def _immutable(value):
    if isinstance(value, dict):
        return {key: _immutable(inner) for key, inner in value.items()}
    return tuple(map(_immutable, value)) if isinstance(value, (list, tuple)) else value


@cache
def people_phrases() -> dict:
    """What all writers of phrases/people/*.toml have written, table by table: {table: {name: lines}}."""
    merged: dict = {}
    for path in sorted(Path(__file__).with_name("phrases").glob("people/*.toml")):
        for table, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(value, dict):
                lists = merged.setdefault(table, {})
                for name, lines in value.items():
                    lists[name] = (*lists.get(name, ()), *lines)
            else:
                merged[table] = (*merged.get(table, ()), *value)
    return _immutable(merged)


def families(table: str, name: str | None, split: str) -> tuple:
    """The lines of a split of `people_phrases()[table]`, or of the list `name` in it."""
    return split_families(people_phrases()[table] if name is None else people_phrases()[table][name], split)


@cache
def split_families(lines: tuple, split: str) -> tuple:
    """The lines of a split; of several lines at least one is for tests.

    Two writers may have the same idea: a line that says the same as a test line of any list is in no split, and no line
    says what a template of the other split of phrases/*.toml says.
    """
    new = [line for line in lines if not repeats(line, "train")] or lines
    held_out = [line for line in new if split_of(text_of_line(line)) == "test"]
    held_out = held_out or [min(new, key=lambda line: zlib.crc32(text_of_line(line).encode()))]
    if split == "test":
        return tuple(held_out)
    train = [line for line in lines if line not in held_out and not repeats(line, "test")]
    return tuple(line for line in train if not phrasings(line) & held_out_phrasings()) or tuple(train or lines)


def text_of_line(line: str | tuple) -> str:
    """A line of `problems` is a pair: its text and the expression."""
    return line if isinstance(line, str) else line[0]


@cache
def phrasings(line: str | tuple) -> frozenset[str]:
    """What a line can say, without case and punctuation; the first 500 things, if it can say more."""
    parts = re.split(r"\[([^\[\]]*)\]", text_of_line(line))  # text, alternatives, text ...
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    texts = {"".join(choice) for choice in islice(product(*choices), 500)}
    return frozenset(normalize(text) or text.strip() for text in texts)  # emoji and other scripts stay as they are


@cache
def repeats(line: str | tuple, split: str) -> bool:
    """Whether a line says what one of the templates of WORD_SOURCES in this split can say."""
    return any(map(template_pattern(split).fullmatch, phrasings(line)))


@cache
def template_pattern(split: str) -> re.Pattern:
    """Matches what the templates of a split say, with anything in their slots, without case and punctuation."""
    templates = {normalize(text) for name in WORD_SOURCES for text in texts_under(load_phrases(name), split)}
    wordy = sorted(template for template in templates if re.search(TEMPLATE_WORD, template))  # not "{sum}" alone
    return re.compile("|".join(re.sub(r"\\{\w+\\}", ".+", re.escape(template)) for template in wordy))


def texts_under(value, key: str) -> Iterator[str]:
    """All texts of the lists under a key, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from inner if name == key else texts_under(inner, key)


@cache
def held_out_phrasings() -> frozenset[str]:
    """What the test lines of all lists can say."""
    lists = []
    for table in people_phrases().values():
        if isinstance(table, dict):
            lists += table.values()
        elif isinstance(table[0], dict):
            lists += [fact["ask"] for fact in table]
        else:
            lists.append(table)
    return frozenset().union(*(phrasings(line) for lines in lists for line in split_families(lines, "test")))


def choose_alternatives(rng: random.Random, line: str) -> str:
    """A member of a family: one of the alternatives for each `[a|b]`."""
    return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), line)


NEXT_KEYS = dict(zip("qwertyuiopasdfghjklzxcvbnm", "wertyuiopqsdfghjklaxcvbnmz"))
SLOT_OR_LETTERS = re.compile(r"{\w+}|[A-Za-z]{4,}")


def type_carelessly(rng: random.Random, template: str) -> str:
    """The template as people type it: a quarter in lower case, a quarter without final mark, a tenth mistyped."""
    if rng.random() < 0.25:
        template = template.lower()
    if rng.random() < 0.25:
        template = template.rstrip("?.!")
    if rng.random() < 0.1:
        words = [match for match in SLOT_OR_LETTERS.finditer(template) if match[0][0] != "{"]
        if words:
            word = rng.choice(words)
            template = template[: word.start()] + mistype(rng, word[0]) + template[word.end() :]
    return template


def mistype(rng: random.Random, word: str) -> str:
    """The word with one letter left out, doubled, exchanged with the next, or replaced by the key next to it."""
    i = rng.randrange(1, len(word) - 1)
    match rng.randrange(4):
        case 0:
            return word[:i] + word[i + 1 :]
        case 1:
            return word[:i] + word[i] + word[i:]
        case 2:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + NEXT_KEYS.get(word[i], word[i]) + word[i + 1 :]


def draw_line(rng: random.Random, lines: Sequence[str], split: str) -> str:
    """A phrasing of a random family, as people type it."""
    line = choose_alternatives(rng, rng.choice(lines))
    return type_carelessly(rng, line) if split == "train" else line


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
