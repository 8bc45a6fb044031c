"""Text to tokens and back: byte-level BPE (Sennrich et al. 2016; on bytes, as in GPT-2).

A text is split into words, a word into its UTF-8 bytes, and the most frequent pair of neighbours becomes a new token,
again and again. Ids: the special tokens, the 256 bytes, then one id per merge in the order they were learned.

bpe.py is the whole algorithm, to be read; tests hold this to it, id by id. `Tokenizer` is the fast one, around Hugging
Face's library; its `tokenizer.json` is what other programs read.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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

# No merge crosses these words. llama.cpp knows this pattern as "qwen2": as GPT-4's, but digits stand alone.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A vocabulary file is text, so GPT-2 gave each byte a character: visible Latin-1 stands for itself, the other bytes
# take the characters from U+0100 on. Byte tokens are ordered by that character.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [b for b in range(256) if b not in VISIBLE]
BYTE_OF = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(BYTE_ORDER[len(VISIBLE) :])}

FIRST_BYTE = len(SPECIAL_TOKENS)
FIRST_MERGE = FIRST_BYTE + 256


class Tokenizer:
    """A byte-level BPE vocabulary. Plain text never encodes to a special token: only `special(name)` gives those."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        # The property that keeps "<|im_end|>" in somebody's text from ending their turn. The file does not hold it.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.chat_template = (
            None  # how an adopted model writes conversations (template.py); ours are written by chat.py
        )
        vocabulary = backend.get_vocab(with_added_tokens=True)
        spelled = set("".join(token for token, i in vocabulary.items() if i not in added))
        if not isinstance(backend.model, models.BPE) or not spelled or not spelled <= BYTE_OF.keys():
            raise UserError("the tokenizer is not a byte-level BPE vocabulary, the only kind nanoghost reads")
        if max(vocabulary.values()) >= 2 * len(vocabulary):
            raise UserError(f"the tokenizer has {len(vocabulary)} tokens and an id of {max(vocabulary.values())}")
        self._bytes = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i in added:
                self._bytes[i] = b"" if added[i].special else token.encode()
            else:
                self._bytes[i] = bytes(BYTE_OF[character] for character in token)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary; a smaller one when the texts have no more pairs that occur twice."""
        if vocab_size < FIRST_MERGE:
            raise UserError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens take {FIRST_MERGE}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((_valid(text) for text in texts), trainer)
        return cls(backend)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read `tokenizer.json` of a folder."""
        path = Path(folder) / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer at {path}") from None
        except Exception as error:  # the library knows no narrower class
            raise UserError(f"{path} is not a readable tokenizer file: {error}") from error
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise UserError(f"{path} is not a byte-level BPE vocabulary, the only kind nanoghost reads")
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into a folder."""
        write_atomic(Path(folder) / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")

    def to_json(self) -> str:
        """`tokenizer.json`."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(_valid(text), add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> list[tuple[int, int]]:
        """(id, where in the text it begins) of each token."""
        encoding = self._backend.encode(_valid(text), add_special_tokens=False)
        return [(i, start) for i, (start, _) in zip(encoding.ids, encoding.offsets)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """As `encode`, on all threads."""
        encodings = self._backend.encode_batch_fast([_valid(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, special tokens nothing or their names."""
        return b"".join(self._pieces(ids, skip_special)).decode(errors="replace")

    def _pieces(self, ids: Iterable[int], skip_special: bool) -> Iterator[bytes]:
        names = {} if skip_special else {i: name.encode() for name, i in self.special_tokens.items()}
        return (names.get(i) or self._bytes[i] for i in ids)

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to the text; nothing for a special token."""
        return self._bytes[id]

    def special_id(self, name: str) -> int:
        """Id of a special token."""
        return self.special_tokens[name]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Its bos_token and eos_token, in the words of tokenizer_config.json."""
        return (
            self.chat_template.special_tokens_map
            if self.chat_template
            else {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
        )

    @property
    def stop_ids(self) -> set[int]:
        """Tokens after which an answer is over."""
        return (
            self.chat_template.stop_ids
            if self.chat_template
            else {self.special_id("<|im_end|>"), self.special_id("<|endoftext|>")}
        )

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, however its file is laid out."""
        return hashlib.sha256(json.dumps(json.loads(self._backend.to_str()), sort_keys=True).encode()).hexdigest()


class StreamDecoder:
    """Ids one by one to text; a character whose bytes are spread over tokens appears with the last of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character was begun and not finished."""
        return self._utf8.decode(b"", final=True)


def _valid(text: str) -> str:
    """The text, lone surrogates (careless JSON has them; UTF-8 has not) replaced by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
