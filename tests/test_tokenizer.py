"""The tokenizer against the reference implementation, and properties that hold for any text."""

import json
import random
import string
import time
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoghost.commands.tokenizer import (
    SAMPLES,
    TokenizerEvalSettings,
    TokenizerTrainSettings,
    eval_command,
    train_command,
)
from nanoghost.errors import UserError
from nanoghost.tokenizer import tokenizer as tokenizer_module
from nanoghost.tokenizer.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer
from tests.support.reference_bpe import (
    reference_decode,
    reference_encode,
    reference_encode_words,
    reference_merges,
    reference_split,
    reference_tokens,
    reference_train,
)
from tests.support.source_tree import ROOT
from tests.support.toys import toy_text

MIXED = [
    "O, that this too too solid flesh would melt,\nThaw and resolve itself into a dew!\n\n  'Tis 1601; we'll see.",
    "def thaw(flesh):\n    return [dew for dew in flesh if dew != 'melt']  # 12,345.67\n\t\tpass\r\n",
    "Grüße aus Zürich, naïve café, Ω≈ç√ — 東京の東の東, привет привет, नमस्ते नमस्ते, 👩‍👩‍👧 👩‍👩‍👧",
    "aaaaaaaaaaaaaaa aaaaaaa aaaa bababababa      \n\n\n\n    x\u00a0\u2003y <|im_start|>user <|im_start|>user",
]
PIECES = [*"ab 's1\n\t\r'É東ſ\u0301\ud7ff\U0001f469\u200d", *SPECIAL_TOKENS]
ANY_TEXT = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


@cache
def toy() -> Tokenizer:
    return Tokenizer.train(MIXED * 2, 420)


@cache
def toy_merges():
    return reference_train(MIXED * 2, 420)


def library_merges(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    model = json.loads(tokenizer._backend.to_str())["model"]
    return [(model["vocab"][left], model["vocab"][right]) for left, right in model["merges"]]


def assert_same_training(texts, vocab_size):
    fast, merges = Tokenizer.train(texts, vocab_size), reference_train(texts, vocab_size)
    assert library_merges(fast) == merges
    assert [fast.token_bytes(i) for i in range(fast.vocab_size)] == reference_tokens(merges)
    for text in texts:
        assert fast.encode(text) == reference_encode(text, merges)


def test_training_equals_the_reference_on_mixed_text():
    assert_same_training(MIXED * 2, 420)


@given(st.lists(st.text("ab", max_size=40), max_size=6), st.integers(263, 400))
@example(["ab cd ef gh"] * 2, 400)  # all pairs are equally frequent
@example(["a" * n for n in range(50)], 400)
@settings(max_examples=150, deadline=None)
def test_training_equals_the_reference_on_repeats_and_ties(texts, vocab_size):
    assert_same_training(texts, vocab_size)


@given(st.lists(ANY_TEXT, max_size=4))
@settings(max_examples=50, deadline=None)
def test_training_equals_the_reference_on_any_text(texts):
    assert_same_training([*texts, *texts], 300)


def test_words_equal_those_of_the_library_for_every_character():
    """Also for characters newer than the tables of the library: all of planes 0 and 1, and a sample of the rest."""
    split = toy()._backend.pre_tokenizer[0]
    codes = [c for c in [*range(0x20000), *range(0x20000, 0x110000, 50)] if not 0xD800 <= c < 0xE000]
    for i in range(0, len(codes), 1000):
        text = "".join(f"{c}{c}a1 {c}\n" for c in map(chr, codes[i : i + 1000]))
        assert reference_split(text) == [word.encode() for word, _ in split.pre_tokenize_str(text)]


def in_pieces(text: str, length: int) -> list[str]:
    return [text[i : i + length] for i in range(0, len(text), length)]


@given(st.sampled_from("ab1= \n漢"), st.integers(1, 40), st.integers(300, 330))
@settings(max_examples=50, deadline=None)
def test_a_long_word_is_learned_in_pieces(character, length, vocab_size):
    text = character * length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "MAX_TRAINING_WORD", 8)
        fast = Tokenizer.train([text, text], vocab_size)
    assert library_merges(fast) == reference_train(in_pieces(text, 8) * 2, vocab_size)


def test_the_vocabulary_of_ordinary_text_does_not_depend_on_the_length_of_pieces(monkeypatch):
    """Invented English, mixed scripts, Python source, Markdown with tables and lines of symbols."""
    sources = [path.read_text() for path in [*ROOT.glob("nanoghost/*/*.py"), *ROOT.glob("docs/*.md")]]
    texts = [toy_text(), *MIXED, *sources]
    fingerprint = Tokenizer.train(texts, 2000).fingerprint
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_WORD", 10**9)
    assert Tokenizer.train(texts, 2000).fingerprint == fingerprint


def random_text(characters: str, length: int) -> str:
    return "".join(random.Random(0).choices(characters, k=length))


LONG_WORDS = {
    "one letter": "a" * 200_000,
    "two letters": random_text("ab", 200_000),
    "Chinese without punctuation": random_text("".join(map(chr, range(0x4E00, 0x4E00 + 3000))), 200_000),
    "line ends": "\n" * 2_000_000,
    "blanks": " " * 2_000_000,
    "tabs and blanks": random_text(" \t", 400_000),
    "base64": random_text(string.ascii_letters + string.digits + "+/", 1_000_000),
    "digits": random_text(string.digits, 1_000_000),
    "symbols": random_text(string.punctuation, 1_000_000),
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_text_without_spaces_is_learned_and_encoded_in_seconds(kind):
    """The time once grew with the square of the length: 25 s for the first, more than minutes for others."""
    text = LONG_WORDS[kind]
    start = time.process_time()
    tokenizer = Tokenizer.train([text], 4096)
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 30
    assert tokenizer.decode(ids) == text
    elsewhere = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert elsewhere.encode(text).ids == ids


@given(ANY_TEXT)
@example("\u0558l'\u0558")
@settings(max_examples=300, deadline=None)
def test_encoding_equals_the_reference_and_decoding_inverts_it(text):
    ids = toy().encode(text)
    assert ids == reference_encode(text, toy_merges())
    assert toy().decode(ids) == text
    assert b"".join(map(toy().token_bytes, ids)) == text.encode()
    assert toy().encode_batch([text, "", text]) == [ids, [], ids]


@given(st.dictionaries(st.binary(max_size=30), st.integers(1, 9), max_size=8), st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_the_reference_encodes_any_bytes(words, unseen):
    merges = reference_merges(words, 300)
    tokens = reference_tokens(merges)[len(SPECIAL_TOKENS) :]
    assert len(set(tokens)) == len(tokens) <= 300 - len(SPECIAL_TOKENS)  # no two tokens have the same bytes
    for word in [*words, unseen]:
        assert reference_decode(reference_encode_words([word], merges), merges) == word


@given(ANY_TEXT, st.sampled_from(SPECIAL_TOKENS), ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_text_never_encodes_to_a_special_token(before, special, after):
    text = before + special + after
    assert min(toy().encode(text)) >= len(SPECIAL_TOKENS)
    assert min(toy().encode_batch([text])[0]) >= len(SPECIAL_TOKENS)
    assert toy().decode(toy().encode(text)) == text


@given(st.lists(st.integers(0, 419)))
@settings(max_examples=200, deadline=None)
def test_stream_decoding_equals_decoding_at_once(ids):
    ids = [i % toy().vocab_size for i in ids]
    stream = StreamDecoder(toy())
    assert "".join([stream.feed(i) for i in ids] + [stream.flush()]) == toy().decode(ids)
    assert toy()._backend.decode(ids) == toy().decode(ids)  # other programs decode the same text


def test_stream_decoding_holds_back_incomplete_characters():
    byte_tokens = Tokenizer.train([], 263)
    stream = StreamDecoder(byte_tokens)
    assert [stream.feed(i) for i in byte_tokens.encode("é東")] == ["", "é", "", "", "東"]
    assert (stream.feed(byte_tokens.encode("東")[0]), stream.flush()) == ("", "\ufffd")


def test_special_tokens_have_ids_by_name_and_no_bytes():
    assert [toy().special_id(name) for name in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert {toy().token_bytes(i) for i in range(len(SPECIAL_TOKENS))} == {b""}
    ids = [toy().special_id("<|im_start|>"), *toy().encode("user"), toy().special_id("<|im_end|>")]
    assert toy().decode(ids) == "user"
    assert toy().decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"


def test_a_saved_vocabulary_is_the_same_after_loading(tmp_path):
    toy().save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    text = "".join(MIXED) + "".join(SPECIAL_TOKENS)
    assert loaded.encode(text) == toy().encode(text)
    assert loaded.fingerprint == toy().fingerprint != Tokenizer.train(MIXED, 300).fingerprint
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]

    elsewhere = tokenizers.Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json"))
    assert elsewhere.encode("".join(SPECIAL_TOKENS)).ids == list(range(len(SPECIAL_TOKENS)))
    assert elsewhere.decode(list(range(len(SPECIAL_TOKENS)))) == ""


def test_truncation_and_padding_that_a_file_asks_for_do_not_change_a_prompt(tmp_path):
    """Training scripts leave them in tokenizer.json; transformers too ignores them unless it is told to."""
    toy().save(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(file | {"truncation": truncation, "padding": padding}))
    loaded = Tokenizer.load(tmp_path)
    for text in MIXED:
        assert loaded.encode(text) == toy().encode(text)


def test_a_short_text_gives_a_small_vocabulary():
    assert Tokenizer.train([], 4096).vocab_size == 263
    assert Tokenizer.train(["abab"], 4096).vocab_size == 264
    assert toy().vocab_size == 420


def test_lone_surrogates_become_replacement_characters():
    assert toy().decode(toy().encode("a\ud800b")) == "a\ufffdb"


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is not a readable") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).to_str())
    with pytest.raises(UserError, match="not a byte-level BPE"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="vocabulary of 100 is too small"):
        Tokenizer.train(["text"], 100)


def test_the_commands_save_and_evaluate_a_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "home"))
    (tmp_path / "notes.txt").write_text("\n\n".join(MIXED * 3))
    train_command(TokenizerTrainSettings(data=str(tmp_path / "notes.txt"), vocab_size=300, name="notes"))
    tokenizer = Tokenizer.load(tmp_path / "home" / "data" / "tokenizers" / "notes")

    eval_command(TokenizerEvalSettings(name="notes", json=True))
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["vocab_size"] == tokenizer.vocab_size == 300
    assert figures["bytes_per_token"].keys() == SAMPLES.keys()
    for kind, text in SAMPLES.items():
        assert figures["bytes_per_token"][kind] == len(text.encode()) / len(tokenizer.encode(text)) >= 1

    with pytest.raises(UserError, match="nothing.*does not exist"):
        eval_command(TokenizerEvalSettings(name="nothing"))
    with pytest.raises(UserError, match="not a tokenizer name"):
        train_command(TokenizerTrainSettings(name="../elsewhere"))
