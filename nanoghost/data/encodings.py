"""Which encoding a text that is not UTF-8 may have, for the error message."""

import codecs

import regex

SAMPLE_BYTES = 2**16

SIGNS = r"\p{P}\p{S}\p{Z}"
ASIAN_SIGNS = rf"{SIGNS}\p{{N}}\p{{Latin}}\p{{Greek}}\p{{Cyrillic}}"  # full-width ones are part of these encodings
JAPANESE = rf"[\p{{Han}}\p{{Hiragana}}[\p{{Katakana}}--[\uff61-\uff9f]]ー{ASIAN_SIGNS}]"
CHINESE = rf"[\p{{Han}}{ASIAN_SIGNS}]"
CYRILLIC = rf"(?<![A-Za-z])\p{{Cyrillic}}(?![A-Za-z])|[{SIGNS}]"
CYRILLIC_WORD = r"[\p{Cyrillic}&&\p{Ll}]{3}"  # in the other Cyrillic encoding these are capital letters
ACCENTED_WORD = r"[A-Za-z][\p{Latin}--\p{ASCII}]|[\p{Latin}--\p{ASCII}][A-Za-z]"
ENCODINGS = (
    ("cp932", "cp932", JAPANESE, r"\p{Hiragana}{2}"),
    ("euc-jp", "euc-jp", JAPANESE, r"\p{Hiragana}{2}"),
    ("euc-kr", "cp949", rf"[\p{{Hangul}}{ASIAN_SIGNS}]", r"\p{Hangul}{2}"),
    ("gb2312", "gb18030", CHINESE, r"\p{Han}{2}"),
    ("big5", "big5", CHINESE, r"\p{Han}{2}"),
    ("gb18030", "gb18030", CHINESE, r"\p{Han}{2}"),
    ("cp1253", "cp1253", rf"[[\p{{Greek}}--[ςσ]]{SIGNS}]|ς(?!\p{{L}})|σ(?=\p{{L}})", r"\p{Greek}ς"),
    ("koi8-r", "koi8-r", CYRILLIC, CYRILLIC_WORD),
    ("cp1251", "cp1251", CYRILLIC, CYRILLIC_WORD),
    ("cp1252", "cp1252", rf"[\p{{Latin}}{SIGNS}]|(?<!\w{{3}})[¹²³](?!\p{{L}})", ACCENTED_WORD),
    ("cp1250", "cp1250", rf"[\p{{Latin}}{SIGNS}]", ACCENTED_WORD),
)
"""(encoding, it or a larger one that contains it, its characters beyond ASCII, what occurs in most texts), the most
specific first. Texts of another encoding decode, too, but to other scripts, or to signs within words."""


def likely_encoding(raw: bytes) -> str:
    """The first encoding in which the bytes look like text, as a name for iconv; "" if there is none."""
    for codec, name, characters, typical in ENCODINGS:
        try:
            text = codecs.getincrementaldecoder(codec)().decode(raw[:SAMPLE_BYTES])  # the sample may end in a character
        except UnicodeDecodeError:
            continue
        is_text = regex.fullmatch(rf"(?V1)(?:[\x09-\x0d\x20-\x7e]|{characters})*+", text)
        if is_text and regex.search(rf"(?V1){typical}", text):
            return name
    return ""
