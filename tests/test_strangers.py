"""Strangers' lines: the file, the verdict, and conversations of several turns."""

import re

import pytest

from nanoghost.evals.strangers import hold_conversations, is_good, strangers_accuracy, strangers_lines
from nanoghost.tasks.messages import assistant, user
from nanoghost.tasks.wording import normalize, people_phrases, phrasings
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.engine_toys import toy_model
from tests.support.toys import toy_text


def test_every_line_can_be_asked_and_judged():
    for line in strangers_lines():
        assert set(line) <= {"kind", "user", "good", "regex"}
        assert 1 <= len(line["user"]) <= 3
        re.compile(line.get("regex", ""))
    kinds = [line["kind"] for line in strangers_lines()]
    assert min(map(kinds.count, kinds)) >= 4


def test_no_strangers_line_is_a_phrasing_that_is_taught():
    """At most one of three words, which anybody would think of."""
    taught = set()
    for table in people_phrases().values():
        for lines in table.values() if isinstance(table, dict) else [table]:
            for line in lines:
                if not isinstance(line, dict):
                    taught |= phrasings(line)
    for line in strangers_lines():
        plain = normalize(line["user"][0])
        assert plain not in taught or len(plain.split()) <= 3, line


@pytest.mark.parametrize(
    "kind, reply, regex, good",
    [
        ("arithmetic", "6*7 = 42.", r"(?<!\d)42(?!\d)", True),
        ("arithmetic", "6*7 = 142.", r"(?<!\d)42(?!\d)", False),
        ("knowledge", "I DON'T know.", "don't know", True),
        ("greeting", "Hello!", None, True),
        ("greeting", "", None, False),
        ("greeting", '\n{"name": "calculator"', None, False),
        ("greeting", "to be or not to be or not to be or not to be or", None, False),
        ("creative", "I don't know that: I have only read plays.", None, False),
        ("creative", "No.", None, False),
        ("creative", "The king is dead, my lord.", None, True),
    ],
)
def test_verdicts(kind, reply, regex, good):
    line = {"kind": kind, "user": ["x"]} | ({"regex": regex} if regex else {})
    assert is_good(line, [user("x"), assistant(reply)]) == good


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


def test_each_turn_is_answered_before_the_next(tokenizer):
    lines = [{"user": ["The king"]}, {"user": ["The queen", "and the sea", "Anna"]}]
    conversations = hold_conversations(toy_model("ghost", tokenizer), tokenizer, lines)
    assert [[m["content"] for m in messages if m["role"] == "user"] for messages in conversations] == [
        line["user"] for line in lines
    ]
    assert [messages[-1]["role"] for messages in conversations] == ["assistant", "assistant"]
    assert [m["role"] for m in conversations[1]][:3] == ["user", "assistant", "user"]


def test_few_lines_are_spread_over_the_kinds(tokenizer):
    results = strangers_accuracy(toy_model("ghost", tokenizer), tokenizer, 20)
    assert 15 <= sum(result["count"] for result in results.values()) <= 30
    assert len(results) >= 8
