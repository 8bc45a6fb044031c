"""What some rows want at each token: only tokens that a grammar allows, and how probable the likeliest ones were.

A grammar (llguidance: a JSON schema, compiled to an automaton over bytes) tells before each token which ones may follow. T
tokens, V vocabulary.
"""

import json

import torch
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from nanoghost.tokenizer.tokenizer import Tokenizer

# Blanks between the parts of a JSON text are the model's to choose in most grammars, and a small model then writes them for
# ever. Here they stand where json.dumps puts them, as in most of what models have read.
BLANKS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

Likely = tuple[float, list[tuple[int, float]]]
"""Of one token: its log-probability, and the likeliest tokens with theirs, before temperature and grammar."""


class Vocabulary:
    """A tokenizer in llguidance's words."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        self.encode = tokenizer.encode
        self.eos_token_id = min(tokenizer.ends)
        self.special_token_ids = sorted(tokenizer.specials.values())
        names = {number: name.encode() for name, number in tokenizer.specials.items()}
        self.tokens = [names.get(i) or tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]

    def __call__(self, text) -> list[int]:
        return self.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


def grammar_tokens(tokenizer: Tokenizer) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(Vocabulary(tokenizer)), eos_token=sorted(tokenizer.ends))


def json_grammar(schema: dict) -> str:
    """The grammar of JSON texts of a schema. What is no schema shows in `complaint`."""
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=BLANKS)


def complaint(grammar: str, tokens: LLTokenizer | None = None) -> str:
    """Why a grammar cannot be used; empty if it can."""
    return LLMatcher.validate_grammar(grammar, tokens)


class Watcher:
    """`top`: how many of the likeliest tokens to note at each place; None notes nothing."""

    def __init__(self, grammar: LLMatcher | None = None, top: int | None = None):
        self.grammar, self.top = grammar, top
        self.noted: list[Likely] = []

    def before(self, logits_V: torch.Tensor) -> None:
        if self.top is not None:
            self.logprobs_V = torch.log_softmax(logits_V.float(), 0)
        if self.grammar:
            allowed = torch.frombuffer(bytearray(self.grammar.compute_logit_bias()), dtype=torch.uint8) > 0
            allowed = allowed.to(logits_V.device)
            logits_V[: len(allowed)].masked_fill_(~allowed, float("-inf"))
            logits_V[len(allowed) :] = float("-inf")  # a matrix may have more rows than the vocabulary has tokens

    def after(self, token: int) -> None:
        if self.top is not None:
            [likely] = likely_of(self.logprobs_V[None], [token], self.top)
            self.noted.append(likely)
        if self.grammar:
            self.grammar.consume_token(token)


def likely_of(logprobs_TV: torch.Tensor, tokens: list[int], top: int) -> list[Likely]:
    """Of each token, what was expected in its place."""
    own = logprobs_TV.gather(1, torch.tensor(tokens, device=logprobs_TV.device)[:, None])[:, 0].tolist()
    values, ids = logprobs_TV.topk(min(top, logprobs_TV.size(1)))
    return [(x, list(zip(some, theirs))) for x, some, theirs in zip(own, ids.tolist(), values.tolist())]
