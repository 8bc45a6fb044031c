"""Grammars for constrained decoding: a JSON schema or a tool call, compiled by llguidance to an automaton over bytes.

llguidance's `LLMatcher` holds the state of one sequence and computes which tokens may come next; logits_processors.py
forbids the others.
"""

import json
from functools import lru_cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools.calculator import MAX_LENGTH

# Most grammars let the model choose the whitespace between the parts of a JSON text, and a small model then writes
# whitespace forever. Here it is where json.dumps puts it, as in most of the text that models are trained on.
WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Vocabulary:
    """A tokenizer with the attributes that llguidance expects."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self.encode = tokenizer.encode
        self.eos_token_id = min(tokenizer.stop_ids)
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        special_tokens = {token_id: name.encode() for name, token_id in tokenizer.special_tokens.items()}
        self.tokens = [special_tokens.get(i) or tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text) -> list[int]:
        return self.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


@lru_cache(maxsize=8)
def grammar_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """The tokenizer in the form that `LLMatcher` needs."""
    return LLTokenizer(TokenizerWrapper(Vocabulary(tokenizer)), eos_token=sorted(tokenizer.stop_ids))


def json_grammar(schema: dict) -> str:
    """The grammar of the JSON texts that match a schema. `grammar_error` reports an invalid schema."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=WHITESPACE)


# A small model may repeat a character of an expression until its context is full. The calculator takes none so long.
EXPRESSION = {"type": "string", "maxLength": MAX_LENGTH}
CALL_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "arguments": {"type": "object", "properties": {"expression": EXPRESSION}},
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
    "x-guidance": WHITESPACE,
}


def call_matcher(tokenizer: Tokenizer) -> LLMatcher:
    """The state of what a model trained here writes after <tool_call>: one JSON object and the closing tag."""
    end_id = tokenizer.special_id("</tool_call>")
    grammar = f'start: "\\n" call "\\n" <[{end_id}]>\ncall: %json {json.dumps(CALL_SCHEMA)}\n'
    return LLMatcher(grammar_tokenizer(tokenizer), grammar)


def grammar_error(grammar: str, tokens: LLTokenizer | None = None) -> str:
    """Why a grammar cannot be used; empty if it can."""
    return LLMatcher.validate_grammar(grammar, tokens)
