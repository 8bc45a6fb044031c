"""Text to tokens and back: byte-level BPE (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al. 2019).

A text is split into words and a word into its UTF-8 bytes. Training merges the most frequent pair of adjacent tokens
into a new token, again and again. Token ids: the special tokens, the 256 bytes, then the merges in the order they were
learned.

`Tokenizer` wraps Hugging Face's library and reads and writes its `tokenizer.json`. tests/support/reference_bpe.py is
the whole algorithm in readable Python; the tests compare the two id by id.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from nanoghost.errors import UserError
from nanoghost.home import write_atomic

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)

# Words, which no merge crosses. llama.cpp calls this pattern "qwen2": GPT-4's, but with every digit a word of its own.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The time for learning merges grows with the square of the length of a word, so longer ones are learned in pieces of so
# many characters. They are not words of a language, but lines of one symbol, blanks, or text without spaces.
MAX_TRAINING_WORD = 512

# A vocabulary file is text, so GPT-2 maps each byte to a character: a printable Latin-1 byte to itself, the others to
# the characters from U+0100 on. The byte tokens are in the order of these characters.
PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_ORDER = PRINTABLE_BYTES + OTHER_BYTES
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE_BYTES}
BYTE_OF_CHARACTER |= {chr(256 + i): byte for i, byte in enumerate(OTHER_BYTES)}

FIRST_BYTE = len(SPECIAL_TOKENS)
FIRST_MERGE = FIRST_BYTE + 256


class Tokenizer:
    """A byte-level BPE vocabulary. Text never encodes to a special token; only `special_id(name)` returns one.

    (An added token that is not special is ordinary text to `encode`; chat templates tell it from what is typed.)"""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        # Without this, "<|im_end|>" in a user's text would end their turn. The setting is not part of the file.
        backend.encode_special_tokens = True
        added_tokens = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added_tokens.items() if token.special}
        """Id of each special token by name."""
        self.template_tokens = {
            token.content: i for i, token in added_tokens.items() if token.special or not token.content.isspace()
        }
        """Id of each token, special or not, that a chat template writes and that nobody can type. (White space among
        the added tokens is ordinary text.)"""
        self.chat_template = None
        """The ChatTemplate of an imported model; None for models trained here, whose format is chat_format.py."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        characters = set("".join(token for token, i in vocabulary.items() if i not in added_tokens))
        if not isinstance(backend.model, models.BPE) or not characters or not characters <= BYTE_OF_CHARACTER.keys():
            raise UserError("the tokenizer is not a byte-level BPE vocabulary, the only kind nanoghost reads")
        largest_id = max(vocabulary.values())
        if largest_id >= 2 * len(vocabulary):
            raise UserError(f"the tokenizer has {len(vocabulary)} tokens, but an id of {largest_id}")
        self._ids = frozenset(vocabulary.values())
        self.unused_ids = [i for i in range(largest_id) if i not in self._ids]
        """Ids below the largest one without a token."""
        self._bytes = [b""] * (largest_id + 1)
        for token, i in vocabulary.items():
            if i not in added_tokens:
                self._bytes[i] = bytes(BYTE_OF_CHARACTER[character] for character in token)
            elif not added_tokens[i].special:
                self._bytes[i] = token.encode()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary. It is smaller than `vocab_size` if no further pair of tokens occurs twice."""
        if vocab_size < FIRST_MERGE:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone take {FIRST_MERGE}"
            )
        words = pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend = tokenizers.Tokenizer(models.BPE())
        backend.decoder = decoders.ByteLevel()
        pieces = pre_tokenizers.FixedLength(MAX_TRAINING_WORD)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, to_bytes])  # of the training alone
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((replace_lone_surrogates(text) for text in texts), trainer)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
        return cls(backend)

    @classmethod
    def load(cls, folder: Path, special_tokens: Iterable[str] = ()) -> "Tokenizer":
        """Read `tokenizer.json` of a folder. `special_tokens`: tokens of the vocabulary to regard as special."""
        path = Path(folder) / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except Exception as error:  # the library raises no narrower class
            raise UserError(f"{path} is not a readable tokenizer file: {error}") from error
        backend.no_truncation()  # left in the file by a training elsewhere; they would change each part of a prompt
        backend.no_padding()
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise UserError(f"{path} is not a byte-level BPE vocabulary, the only kind nanoghost reads")
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        ordinary = [token for token in {*special_tokens} - special if backend.token_to_id(token) is not None]
        backend.add_special_tokens([AddedToken(token, special=True) for token in sorted(ordinary)])
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into a folder."""
        write_atomic(Path(folder) / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")

    def to_json(self) -> str:
        """The content of `tokenizer.json`, without line breaks."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(replace_lone_surrogates(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> list[tuple[int, int]]:
        """(token id, index of its first character in the text) for each token."""
        encoding = self._backend.encode(replace_lone_surrogates(text), add_special_tokens=False)
        return [(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for many texts, on all threads."""
        encodings = self._backend.encode_batch_fast(
            [replace_lone_surrogates(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD, special tokens their names or nothing."""
        names = {}
        if not skip_special:
            names = {i: name.encode() for name, i in self.special_tokens.items()}
        return b"".join(names.get(i) or self._bytes[i] for i in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; empty for a special token."""
        return self._bytes[token_id]

    def special_id(self, name: str) -> int:
        """The id of a special token."""
        return self.special_tokens[name]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """bos_token and eos_token, as in tokenizer_config.json."""
        if self.chat_template:
            return self.chat_template.special_tokens_map
        return {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

    @cached_property
    def template_token_pattern(self) -> re.Pattern:
        """One group, which matches each of `template_tokens`: the longest of those that begin at a character."""
        longest_first = sorted(self.template_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end a reply."""
        if self.chat_template:
            return self.chat_template.stop_ids
        return {self.special_id("<|im_end|>"), self.special_id("<|endoftext|>")}

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    def has_token(self, token_id: int) -> bool:
        return token_id in self._ids

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, independent of the layout of its file."""
        return hashlib.sha256(json.dumps(json.loads(self._backend.to_str()), sort_keys=True).encode()).hexdigest()


class StreamDecoder:
    """Decodes token ids one at a time. A character that is spread over tokens is returned with the last of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """The rest at the end: U+FFFD for an incomplete character, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


def replace_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can contain and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
