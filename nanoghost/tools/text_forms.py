"""The same word in another form: other Unicode encodings, and scripts that put no blanks between words.

A word is found in an English text by the blanks around it. Chinese, Japanese, Thai, Khmer, Lao and Burmese have none,
Korean attaches particles to its words, and emoji stand where people like. The regular expressions here treat each
character of these scripts as `UNSPACED`, and the letters and digits of all other scripts as `SPACED`.
"""

import unicodedata
from functools import lru_cache

import regex

UNSPACED = r"[\p{Han}\p{Hangul}\p{Hiragana}\p{Katakana}ー\p{Line_Break=SA}\p{Regional_Indicator}[\p{ExtPict}--[©®™]]]"
"""Line_Break=SA: the South East Asian scripts. ExtPict: emoji."""
SPACED = rf"[[\p{{L}}\p{{M}}\p{{Nd}}]--{UNSPACED}]"

# Letters with invisible characters between them. Without ½, ² and ™: they are not another form of a word.
WORD_OR_RUN = regex.compile(rf"(?V1)[\p{{L}}\p{{M}}\p{{Nd}}\p{{DI}}{UNSPACED}]+")
PARTS = regex.compile(rf"(?V1)(?P<run>{UNSPACED}+)|{SPACED}+")


def fold(text: str) -> str:
    """The text without case, compatibility forms (full width, ligatures) and invisible characters, in one line.

    Composed and decomposed accents become the same characters; "é" remains another letter than "e".
    """
    if not text.isascii():
        text = regex.sub(r"\p{DI}+", "", unicodedata.normalize("NFKC", text))
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.lower().split())


@lru_cache(maxsize=4096)
def whole_word(value: str, ending: str = "") -> regex.Pattern:
    """Finds a value in folded text as a whole word ("4" is not in "42"), or anywhere in scripts without blanks.

    `ending`: a regular expression for what may follow the word. A value without visible characters is nowhere.
    """
    words = fold(value).split()
    if not words:
        return regex.compile("(?!)")
    start, end = starts_with_spaced(words[0]), starts_with_spaced(words[-1][-1])
    before = rf"(?<!{SPACED})" if start else ""
    after = rf"{ending}(?!{SPACED})" if end else ""
    return regex.compile("(?V1)" + before + regex.escape(" ".join(words)) + after)


def starts_with_spaced(text: str) -> bool:
    return regex.match(rf"(?V1){SPACED}", text) is not None


def unusual_parts(text: str) -> list[tuple[str, bool]]:
    """[(part of the folded text, whether it is a run of UNSPACED characters)], without the words of ordinary form.

    Words of ordinary form are those that a full-text search by blanks finds by itself, as all words of English.
    """
    parts = []
    for chunk in WORD_OR_RUN.findall(text):
        if chunk.isascii():
            continue
        for match in PARTS.finditer(fold(chunk)):
            is_run = match["run"] is not None
            if is_run or match[0] != chunk.lower():
                parts.append((match[0], is_run))
    return parts
