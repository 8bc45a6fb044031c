"""Constrained decoding: what a grammar allows, and which log-probabilities are reported."""

import pytest
import torch
from llguidance import LLMatcher

from nanoghost.engine.grammar import call_matcher, grammar_tokenizer, json_grammar
from nanoghost.engine.logits_processors import LogitsProcessor
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools import calculator
from tests.support.toys import toy_text

TOKENIZER = Tokenizer.train([toy_text(100)], 290)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_a_grammar_does_not_let_a_model_write_whitespace_forever():
    """Small models do that when a grammar leaves whitespace free. The model here always prefers a space.

    The reported log-probabilities are those of the model, before the grammar.
    """
    processor = LogitsProcessor(LLMatcher(grammar_tokenizer(TOKENIZER), json_grammar(SCHEMA)), 2)
    space = TOKENIZER.encode(" ")[0]
    spaces = torch.zeros(TOKENIZER.vocab_size + 10)
    spaces[space] = 50.0
    ids = []
    while not ids or ids[-1] not in TOKENIZER.stop_ids:
        logits = spaces + torch.rand(len(spaces), generator=torch.Generator().manual_seed(len(ids)))
        processor.process(logits)
        ids.append(int(logits.argmax()))
        processor.accept(ids[-1])
        assert len(ids) < 60
    assert "  " not in TOKENIZER.decode(ids)
    assert len(processor.recorded_logprobs) == len(ids)
    _, top = processor.recorded_logprobs[0]
    assert top[0] == (space, pytest.approx(0, abs=1e-3))


def test_an_expression_ends_before_the_context_is_full():
    """A small model may repeat a character forever."""
    start = '\n{"name": "calculator", "arguments": {"expression": "'
    for length, fits in ((calculator.MAX_LENGTH, True), (calculator.MAX_LENGTH + 1, False)):
        ids = TOKENIZER.encode(start + "2" * length + '"')
        assert (call_matcher(TOKENIZER).validate_tokens(ids) == len(ids)) == fits
