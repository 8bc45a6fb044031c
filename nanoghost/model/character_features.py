"""What a model of tokens can't see: the letters, of the whole word and not only of the token.

A word is a run of letters, or of digits, whatever tokens it is cut into. Each token knows all of its word that was read
so far: the letters counted from the front, the same letters counted from the back, and where they end.

B batch, S tokens read so far, T those of them that are new, V vocabulary.
"""

import torch

KEPT = 12  # bytes kept of a token
WORD = 16  # letters kept of a word
ENDS = 8  # letters seen from the front, and from the back
HOPS = 20  # tokens of a word: "t-h-o-u" has seven
END, SYMBOLS = 256, 257  # a symbol is a byte or the end of the word
PLACES = 2 * ENDS
NOTHING = PLACES * SYMBOLS  # the row that stands for no symbol


def kind(byte: int) -> int:
    """1 for letters (and whatever is beyond ASCII), 2 for digits, 0 for what no word holds."""
    return 1 if chr(byte).isalpha() or byte > 127 else 2 if chr(byte).isdigit() else 0


def letter_table(tokenizer) -> torch.Tensor:
    """(V, 3 + KEPT): how many letters a token has, the kind of its first byte and of its last one, and its bytes.

    A space in front does not count as a letter, so that " day" has the letters of "day"; but it begins a new word.
    A hyphen is no letter but joins: "t-h-o-u" is one word.
    """
    table = torch.zeros(tokenizer.vocab_size, 3 + KEPT, dtype=torch.int32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        if text:
            letters = b"" if text == b"-" else (text.lstrip(b" ") or text)[:KEPT]
            kinds = [1, 1] if text == b"-" else [kind(text[0]), kind(text[-1])]
            table[token, :3] = torch.tensor([len(letters), *kinds])
            table[token, 3 : 3 + len(letters)] = torch.tensor(list(letters))
    return table


def is_letter(table):
    """(V,): which tokens are one letter or digit, without a space in front."""
    return (table[:, 0] == 1) & (table[:, 1] > 0)


def letter_tokens(table) -> torch.Tensor:
    """(SYMBOLS,): the token that each byte is alone, -1 where there is none."""
    tokens = torch.full((SYMBOLS,), -1)
    alone = is_letter(table).nonzero()[:, 0]
    tokens[table[alone, 3].long()] = alone
    return tokens


def word_rows(table, tokens_BS, before_BS, at_BT):
    """For the tokens in columns `at` the symbols of their words so far, as rows (place, symbol): (B, T, PLACES).

    `before` tells where the token before each stands, -1 for nowhere.
    """
    device = tokens_BS.device
    B, new = at_BT.shape
    part = table[tokens_BS.gather(1, at_BT)].long()
    inside_BT = torch.ones(B, new, dtype=torch.bool, device=device)
    parts = []  # from the newest token of the word to its first one
    for _ in range(HOPS):
        parts.append((part, inside_BT))
        at_BT = before_BS.gather(1, at_BT)
        earlier = table[tokens_BS.gather(1, at_BT.clamp(0))].long()
        inside_BT = inside_BT & (at_BT >= 0) & (part[..., 1] > 0) & (part[..., 1] == earlier[..., 2])
        part, at_BT = earlier, at_BT.clamp(0)

    places = torch.arange(KEPT, device=device)
    word_BTW = torch.full((B, new, WORD + 2), END, device=device)  # the last column is for what finds no room
    length_BT = torch.zeros(B, new, dtype=torch.long, device=device)
    for part, inside_BT in reversed(parts):
        letters = part[..., :1] * inside_BT[..., None]
        to = torch.where(places < letters, (length_BT[..., None] + places).clamp(max=WORD + 1), WORD + 1)
        word_BTW.scatter_(2, to, part[..., 3:])
        length_BT = (length_BT + letters[..., 0]).clamp(max=WORD)
    word_BTW.scatter_(2, length_BT[..., None], END)

    ends = torch.arange(ENDS, device=device)
    length_BT1 = length_BT[..., None]
    front = word_BTW[..., :ENDS] + ends * SYMBOLS
    from_back = torch.where(ends < length_BT1, length_BT1 - 1 - ends, length_BT1)  # behind the letters stands END
    back = word_BTW.gather(2, from_back) + (ENDS + ends) * SYMBOLS
    rows = torch.cat([front, back], 2)
    seen = torch.cat([ends <= length_BT1, ends <= length_BT1], 2)
    return rows.masked_fill(~(seen & (length_BT1 > 0)), NOTHING)
