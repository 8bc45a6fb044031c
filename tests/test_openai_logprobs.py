"""Log-probabilities in OpenAI's forms: names and bytes of tokens."""

from nanoghost.serve.openai_logprobs import chat_logprobs, completion_logprobs, token_key
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

TOKENIZER = Tokenizer.train([toy_text(100)], 290)
GHOST = TOKENIZER.encode("👻")  # four tokens of one byte, none of which is text by itself


def test_keys_of_tokens_are_unique_and_without_replacement_characters():
    """Completions return top log-probabilities in an object by name: equal names would lose entries."""
    keys = [token_key(TOKENIZER, token_id) for token_id in range(TOKENIZER.vocab_size)]
    assert len(set(keys)) == len(keys)
    assert not any("\ufffd" in key for key in keys)


def test_chat_logprobs_have_the_bytes_of_a_character_that_is_spread_over_tokens():
    entries = chat_logprobs(TOKENIZER, [(token_id, (-1.0, [(token_id, -1.0)])) for token_id in GHOST])["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "👻"


def test_completion_logprobs_add_the_token_itself_to_the_top_candidates():
    tokens = [(GHOST[0], None), *((token_id, (-1.0, [(5, -0.5)])) for token_id in GHOST[1:])]
    table = completion_logprobs(TOKENIZER, tokens, 1)
    assert table["token_logprobs"][0] is None, "nothing comes before the first token"
    assert all(len(candidates) == 2 for candidates in table["top_logprobs"][1:])
