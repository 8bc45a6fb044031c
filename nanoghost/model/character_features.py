"""Character features: for each token, the characters of its word up to that token.

BPE hides spelling from the model: a token is one number whatever its characters are, and a word is often several
tokens. Here a word is a run of letters or of digits, whatever tokens it consists of. The features of a token are the
characters at P positions of its word, 8 counted from the front and 8 from the back, and where the word ends. A hyphen
joins: "t-h-o-u" is one word. The features follow from the tokenizer; nothing about them is learned.

The character copy head (copy_heads.py) needs two more things of this kind: the characters of each word that has ended,
and how many letters have been written since the last blank or mark.

B batch, T new tokens, S tokens read so far, V vocabulary, P positions, L characters of a token, W characters of a word.
"""

from dataclasses import dataclass

import torch

MAX_TOKEN_BYTES = 12  # L: bytes stored for each token
MAX_WORD_CHARACTERS = 40  # W: characters stored for each word
MAX_WORD_TOKENS = 20  # tokens that a word may consist of: "t-h-o-u" has seven
MAX_DOUBLINGS = 7  # letters are counted over at most 2^7 tokens
POSITIONS_PER_END = 8
NUM_POSITIONS = 2 * POSITIONS_PER_END
END_OF_WORD = 256  # follows the 256 byte values
NUM_CHARACTERS = 257  # byte values and END_OF_WORD
# The feature embedding has one row for each position and character, and this padding index after them
NO_FEATURE = NUM_POSITIONS * NUM_CHARACTERS
OTHER, LETTER, DIGIT = 0, 1, 2  # classes of bytes
LENGTH, FIRST_CLASS, LAST_CLASS, FIRST_BYTE = 0, 1, 2, 3  # columns of the character table


def byte_class(byte: int) -> int:
    """LETTER (also for bytes beyond ASCII), DIGIT, or OTHER for what is not part of a word."""
    if chr(byte).isalpha() or byte > 127:
        return LETTER
    return DIGIT if chr(byte).isdigit() else OTHER


def character_table(tokenizer) -> torch.Tensor:
    """(V, 3 + L): for each token its number of characters, the classes of its first and last byte, and its bytes.

    A leading space is not a character of the token, so " day" has the characters of "day", but it begins a new word. A
    hyphen has no characters and the class of a letter on both sides, so it joins what is around it.
    """
    table = torch.zeros(tokenizer.vocab_size, 3 + MAX_TOKEN_BYTES, dtype=torch.int32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        if not text:
            continue
        if text == b"-":
            characters, classes = b"", [LETTER, LETTER]
        else:
            characters = (text.lstrip(b" ") or text)[:MAX_TOKEN_BYTES]
            classes = [byte_class(text[0]), byte_class(text[-1])]
        table[token, :FIRST_BYTE] = torch.tensor([len(characters), *classes])
        table[token, FIRST_BYTE : FIRST_BYTE + len(characters)] = torch.tensor(list(characters))
    return table


def is_single_character(table) -> torch.Tensor:
    """(V,): whether a token is one letter or digit, without a leading space."""
    return (table[:, LENGTH] == 1) & (table[:, FIRST_CLASS] != OTHER)


def single_character_tokens(table) -> torch.Tensor:
    """(NUM_CHARACTERS,): the token that consists of this character alone; -1 if there is none."""
    tokens = torch.full((NUM_CHARACTERS,), -1)
    single = is_single_character(table).nonzero()[:, 0]
    tokens[table[single, FIRST_BYTE].long()] = single
    return tokens


def word_features(words: "WordsSoFar") -> torch.Tensor:
    """(B, T, P): the character at each position of the words so far.

    Values are position * NUM_CHARACTERS + character, or NO_FEATURE after the end of the word.
    """
    word_BTW, length_BT = words.characters_BTW, words.length_BT
    positions = torch.arange(POSITIONS_PER_END, device=word_BTW.device)
    length_BT1 = length_BT[..., None]
    front = word_BTW[..., :POSITIONS_PER_END] + positions * NUM_CHARACTERS
    # Index length_BT1 of a word holds END_OF_WORD
    index_from_back = torch.where(positions < length_BT1, length_BT1 - 1 - positions, length_BT1)
    back = word_BTW.gather(2, index_from_back) + (POSITIONS_PER_END + positions) * NUM_CHARACTERS
    features = torch.cat([front, back], 2)
    in_word = torch.cat([positions <= length_BT1, positions <= length_BT1], 2)
    return features.masked_fill(~(in_word & (length_BT1 > 0)), NO_FEATURE)


@dataclass
class WordsSoFar:
    """The word of each new token up to that token."""

    characters_BTW: torch.Tensor
    """Its characters, then END_OF_WORD; there is room for two more than W."""
    length_BT: torch.Tensor
    """Number of its characters, at most W."""


def words_so_far(table, tokens_BS, prev_index_BS, index_BT) -> WordsSoFar:
    """The words of the new tokens, which are at `index_BT`."""
    device = tokens_BS.device
    B, T = index_BT.shape
    token_BT = table[tokens_BS.gather(1, index_BT)].long()
    in_word_BT = torch.ones(B, T, dtype=torch.bool, device=device)
    parts = []  # (row of the table, whether the token belongs to the word), from the newest token to the first one
    for _ in range(MAX_WORD_TOKENS):
        parts.append((token_BT, in_word_BT))
        index_BT = prev_index_BS.gather(1, index_BT)
        earlier_BT = table[tokens_BS.gather(1, index_BT.clamp(0))].long()
        first_class_BT = token_BT[..., FIRST_CLASS]
        continues_BT = (first_class_BT != OTHER) & (first_class_BT == earlier_BT[..., LAST_CLASS])
        in_word_BT = in_word_BT & (index_BT >= 0) & continues_BT
        token_BT, index_BT = earlier_BT, index_BT.clamp(0)

    offsets = torch.arange(MAX_TOKEN_BYTES, device=device)
    overflow = MAX_WORD_CHARACTERS + 1  # a last column for characters beyond the end of a token or of the word
    word_BTW = torch.full((B, T, MAX_WORD_CHARACTERS + 2), END_OF_WORD, device=device)
    length_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    for token_BT, in_word_BT in reversed(parts):
        count_BT1 = token_BT[..., :FIRST_CLASS] * in_word_BT[..., None]
        target = (length_BT[..., None] + offsets).clamp(max=overflow)
        word_BTW.scatter_(2, torch.where(offsets < count_BT1, target, overflow), token_BT[..., FIRST_BYTE:])
        length_BT = (length_BT + count_BT1[..., 0]).clamp(max=MAX_WORD_CHARACTERS)
    word_BTW.scatter_(2, length_BT[..., None], END_OF_WORD)
    return WordsSoFar(word_BTW, length_BT)


def is_text(table, tokens_BS) -> torch.Tensor:
    """(B, S): whether each token is text, not a special token."""
    return (table[tokens_BS, LENGTH] > 0) | (table[tokens_BS, FIRST_CLASS] != OTHER)  # a hyphen has no characters


def starts_word(table, tokens_BS, prev_index_BS) -> torch.Tensor:
    """(B, S): whether each token begins another word than that of its predecessor, so that the latter has ended."""
    first_class_BS, previous_class_BS = _classes(table, tokens_BS, prev_index_BS)
    return (first_class_BS == OTHER) | (first_class_BS != previous_class_BS)


def letters_written(table, tokens_BS, prev_index_BS) -> torch.Tensor:
    """(B, S): how many letters there are from the last blank or mark up to each token: 3 in "d-o1-g2".

    Unlike in words, digits between letters do not separate, and do not count.
    """
    first_class_BS, previous_class_BS = _classes(table, tokens_BS, prev_index_BS)
    is_joined_BS = (first_class_BS != OTHER) & (previous_class_BS != OTHER)
    count_BS = table[tokens_BS, LENGTH].long() * (table[tokens_BS, LAST_CLASS] == LETTER)
    # Each token adds the count of the token before it, then of the two before that, then of the four before those
    link_BS = torch.where(is_joined_BS, prev_index_BS, -1)
    for _ in range(MAX_DOUBLINGS):
        has_link_BS, target_BS = link_BS >= 0, link_BS.clamp(0)
        count_BS = count_BS + count_BS.gather(1, target_BS) * has_link_BS
        link_BS = torch.where(has_link_BS, link_BS.gather(1, target_BS), -1)
    return count_BS


def _classes(table, tokens_BS, prev_index_BS):
    """(classes of the first byte of each token, of the last byte of its predecessor), OTHER if it has none."""
    last_class_BS = table[tokens_BS, LAST_CLASS]
    previous_class_BS = last_class_BS.gather(1, prev_index_BS.clamp(0)).masked_fill(prev_index_BS < 0, OTHER)
    return table[tokens_BS, FIRST_CLASS], previous_class_BS
