"""The tokens that end an answer. A model names them in several places, and each place may lack some."""

from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer

ANSWER = "Blue."
CONVERSATION = [{"role": "user", "content": "Name a color, please."}, {"role": "assistant", "content": ANSWER}]


def ids_of_field(eos: int | list[int] | None) -> set[int]:
    """The ids in `eos_token_id` of a config: none, one or several."""
    if eos is None:
        return set()
    return set(eos) if isinstance(eos, list) else {eos}


def ids_after_answer(tokenizer: Tokenizer) -> set[int]:
    """The token that the chat template writes after an answer: the first one there that is not text, if any is."""
    ids, _ = render(CONVERSATION, tokenizer)
    answer_starts = (i for i in reversed(range(len(ids))) if ANSWER in tokenizer.decode(ids[i:]))
    answer_start = next(answer_starts, len(ids))
    template_ids = set(tokenizer.template_tokens.values())
    first = next((token_id for token_id in ids[answer_start:] if token_id in template_ids), None)
    return set() if first is None else {first}
