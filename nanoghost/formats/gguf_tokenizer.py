"""Byte-level BPE tokenizers in GGUF files: to and from tokenizer.json.

GGUF stores the vocabulary, the merges and the *name* of the pre-tokenizer, which llama.cpp implements in code.
PRE_TOKENIZERS builds those that nanoghost supports; other names raise UserError.
"""

import json
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.validation import BOOLEAN, INTEGER_ARRAY, STRING, check_fields, integer, list_of, optional

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types in GGUF

KIND_CHECKS = {"tokenizer.ggml.model": optional(STRING), "tokenizer.ggml.pre": optional(STRING)}
TOKENIZER_CHECKS = {
    "tokenizer.ggml.tokens": list_of(STRING),
    "tokenizer.ggml.token_type": INTEGER_ARRAY,
    "tokenizer.ggml.merges": list_of(STRING),
    "tokenizer.ggml.add_bos_token": optional(BOOLEAN),
    "tokenizer.chat_template": STRING,
    "tokenizer.chat_template.tool_use": optional(STRING),
}
BOS_KEY, EOS_KEY, EOT_KEY, EOM_KEY = (f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom"))
SPECIAL_TOKEN_KEYS = (BOS_KEY, EOS_KEY, EOT_KEY, EOM_KEY)

# -- pre-tokenizers ---------------------------------------------------------------------------------------------------

# Parts of the regular expressions that Llama 3 and Qwen 2 split text with; they differ in how they split digits.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
OTHER = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gpt2():
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _llama3():
    return _split_by_regex(CONTRACTIONS + LETTERS + r"|\p{N}{1,3}" + OTHER)


def _qwen2():
    return _split_by_regex(CONTRACTIONS + LETTERS + r"|\p{N}" + OTHER)


def _split_by_regex(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3, "qwen2": _qwen2}

# -- from GGUF --------------------------------------------------------------------------------------------------------


def read_tokenizer(gguf: GGUFFile) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file, with all that tokenizer.json stores."""
    fields = gguf.fields
    check_fields(fields, KIND_CHECKS, gguf.path)
    kind, pre_tokenizer = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(
            f"{gguf.path} has a tokenizer of type {kind}/{pre_tokenizer}; nanoghost supports gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}: adopt the model's Hugging Face folder instead"
        )
    check_fields(fields, TOKENIZER_CHECKS, gguf.path)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    token_id = optional(integer(0, len(tokens) - 1))
    check_fields(fields, dict.fromkeys(SPECIAL_TOKEN_KEYS, token_id), gguf.path)
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    _check_vocabulary(gguf, merges)
    special_ids = {fields[key] for key in SPECIAL_TOKEN_KEYS if key in fields}
    types = [CONTROL if i in special_ids else token_type for i, token_type in enumerate(types)]
    # Unused ones fill up the rows of the embedding: they are no tokens, so that nothing can be made of them.
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}

    is_llama3 = pre_tokenizer == "llama-bpe"
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    if fields["general.architecture"].startswith("qwen"):  # Qwen normalizes text; llama.cpp does not
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, token_type in zip(tokens, types) if token_type == CONTROL]
    user_defined = [token for token, token_type in zip(tokens, types) if token_type == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    bos = fields.get(BOS_KEY)
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", is_llama3):
        if ":" in tokens[bos] or "$" in tokens[bos]:
            raise UserError(f"{gguf.path} begins every text with {tokens[bos]!r}, which tokenizer.json cannot express")
        tokenizer.post_processor = bos_post_processor(tokens[bos], bos)
    return tokenizer


def _check_vocabulary(gguf: GGUFFile, merges: list[tuple]) -> None:
    tokens = gguf.fields["tokenizer.ggml.tokens"]
    type_count = len(gguf.fields["tokenizer.ggml.token_type"])
    vocabulary = set(tokens)
    if len(vocabulary) != len(tokens):
        raise UserError(f"{gguf.path} has a token twice in its vocabulary")
    if type_count != len(tokens):
        raise UserError(f"{gguf.path} has {len(tokens)} tokens, but {type_count} token types")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary:
            raise UserError(f"{gguf.path}: the merge {merge} uses tokens that are not in the vocabulary")


def bos_post_processor(token: str, token_id: int) -> processors.TemplateProcessing:
    """Begins every text with this token, for other programs: nanoghost encodes text without special tokens."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, token_id)]
    )


# -- to GGUF ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GGUFTokenizer:
    """A tokenizer in the form of GGUF's fields."""

    tokens: list[str]
    """One for each row of the embedding."""
    token_types: list[int]
    merges: list[str]
    pre_tokenizer: str
    """Key of PRE_TOKENIZERS."""
    add_bos: bool
    """Whether every text begins with the bos token."""


def to_gguf_tokenizer(tokenizer, vocab_size: int) -> GGUFTokenizer:
    """`vocab_size`: number of rows of the embedding, which may have more rows than the tokenizer has tokens."""
    definition = json.loads(tokenizer.to_json())
    model, normalizer = definition["model"], definition["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise UserError(f"this tokenizer normalizes text ({normalizer['type']}), which GGUF cannot express")
    tokens = [""] * vocab_size
    for token, i in model["vocab"].items():
        tokens[i] = token
    types = [NORMAL if token else UNUSED for token in tokens]
    for added in definition["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return GGUFTokenizer(
        tokens=[token or f"[UNUSED{i}]" for i, token in enumerate(tokens)],
        token_types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        pre_tokenizer=_pre_tokenizer_name(definition),
        add_bos=len(tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("").ids) > 0,
    )


def _pre_tokenizer_name(definition: dict) -> str:
    """Name of the pre-tokenizer of a tokenizer.json."""
    matches = [
        name for name, make in PRE_TOKENIZERS.items() if _same_pre_tokenizer(definition["pre_tokenizer"], make())
    ]
    ignore_merges = definition["model"]["ignore_merges"]
    if not matches or ignore_merges != (matches[0] == "llama-bpe"):  # as llama.cpp does for this name
        raise UserError(f"GGUF has no name for this tokenizer's pre-tokenizer; supported: {', '.join(PRE_TOKENIZERS)}")
    return matches[0]


def _same_pre_tokenizer(definition: dict, candidate) -> bool:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = candidate
    return _without_trim_offsets(definition) == _without_trim_offsets(json.loads(backend.to_str())["pre_tokenizer"])


def _without_trim_offsets(value):
    """`trim_offsets` changes the offsets of tokens in the text and not the tokens."""
    if isinstance(value, dict):
        return {key: _without_trim_offsets(inner) for key, inner in value.items() if key != "trim_offsets"}
    if isinstance(value, list):
        return [_without_trim_offsets(inner) for inner in value]
    return value
