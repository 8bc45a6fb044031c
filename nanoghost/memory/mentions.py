"""Which texts mention a value: those that certainly do, and those that may, in an inflected or compound form.

Certain is the whole word in every Unicode form, also with an s: "Rex", "Rex's", "Rexs". In scripts without blanks it
is the same characters anywhere. Possible are

    the same letters and digits with others between them    "New-York" for "New York", "0170 12 34" for "01701234"
    words that begin like one of its words                  "Rexona" for "Rex", "Анну" for "Анна", "Holt" for "Ada Holt"
    words that contain it, if it has LONG_LETTERS letters   "Remaren" for "Maren"
    the same name as other keyboards write it               "Lukasz" for "Łukasz", "Koeln" for "Köln"

Not found: other names of the same thing (Cologne for Köln), another script (Đorđe, Ђорђе), and traditional Chinese
characters for simplified ones (臺北, 台北), which would need a table.
Words of one or two letters and stop words are not looked for in longer words: they would be found in most texts.
"""

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import regex

from nanoghost.tools.retrieval import STOP_WORDS
from nanoghost.tools.text_forms import SPACED, UNSPACED, fold, starts_with_spaced, whole_word

LONG_LETTERS = 5
JOINED_PREFIXES = r"[\p{Arabic}\p{Hebrew}]"  # scripts in which "and", "the" and "to" are the first letters of a word


@dataclass(frozen=True)
class Mentions:
    certain: tuple[regex.Pattern, ...]
    """For folded texts."""
    possible: tuple[tuple[Callable[[str], str], regex.Pattern], ...]
    """(one of SPELLINGS, pattern for texts in this spelling)."""

    @classmethod
    def of(cls, values: Iterable[str]) -> "Mentions":
        certain, possible = [], []
        for value in values:
            is_character = regex.fullmatch(rf"(?V1)[{UNSPACED}&&\p{{L}}]", fold(value))
            if not is_character:  # which would be a part of many words
                certain.append(whole_word(value, "s?"))
            for spell in SPELLINGS:
                possible += [(spell, regex.compile(rf"(?V1){form}")) for form in possible_forms(spell(value))]
        return cls(tuple(certain), tuple(possible))

    def is_certain(self, text: str) -> bool:
        folded = fold(text)
        return any(pattern.search(folded) for pattern in self.certain)

    def is_possible(self, text: str) -> bool:
        spellings = {spell: spell(text) for spell in SPELLINGS}
        return self.is_certain(text) or any(pattern.search(spellings[spell]) for spell, pattern in self.possible)


OTHER_LETTERS = {"ł": "l", "ø": "o", "đ": "d", "ħ": "h", "ı": "i", "æ": "ae", "œ": "oe", "þ": "th", "ð": "d"}
"""Letters that Unicode does not decompose. (ß is "ss" in folded text.)"""
HIRAGANA_TO_KATAKANA = {chr(code): chr(code + 0x60) for code in range(0x3041, 0x3097)}
PLAIN_LETTERS = str.maketrans(OTHER_LETTERS | HIRAGANA_TO_KATAKANA)


def without_accents(text: str) -> str:
    """The folded text in the letters that every keyboard has, hiragana as katakana."""
    return regex.sub(r"\p{Mn}+", "", unicodedata.normalize("NFKD", fold(text))).translate(PLAIN_LETTERS)


def without_umlauts(text: str) -> str:
    """That text with "o" in place of "oe", which stands for "ö" or "ø", and so on: "Koeln" and "Köln" are "koln"."""
    return regex.sub("(?<=[aou])e|(?<=a)a", "", without_accents(text))


SPELLINGS = (without_accents, without_umlauts)


def possible_forms(value: str) -> list[str]:
    """Regular expressions for the possible forms of a value."""
    words = regex.findall(rf"(?V1)[\p{{L}}\p{{M}}\p{{N}}{UNSPACED}]+", value)
    if not words:
        return []
    forms = [r"\W*".join(map(interrupted, words))]
    if len("".join(words)) < LONG_LETTERS and starts_with_spaced(value):
        forms = [rf"(?<!{SPACED}){forms[0]}(?!{SPACED})"]
    for word in regex.findall(rf"(?V1){SPACED}{{3,}}", value):
        if word in STOP_WORDS or word.isdigit():
            continue
        anywhere = len(word) >= LONG_LETTERS or regex.match(JOINED_PREFIXES, word)
        forms.append(word if anywhere else rf"(?<!{SPACED}){word}")
        if len(word) > 3:
            forms.append(rf"(?<!{SPACED}){word[:-1]}{SPACED}{{0,4}}(?!{SPACED})")
    return forms


def interrupted(word: str) -> str:
    """A word with other characters in it; blanks only between digits and in scripts without blanks."""
    between = r"\W*" if regex.search(rf"(?V1)\p{{N}}|{UNSPACED}", word) else r"[^\w\s]*"
    return between.join(map(regex.escape, word))
