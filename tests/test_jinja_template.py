"""Chat templates of adopted models: what is tokenized, what is trained on, and what a template cannot do."""

from dataclasses import replace

import pytest

from nanoghost.errors import UserError
from nanoghost.tokenizer import jinja_template
from nanoghost.tokenizer.chat_format import render, tool_response_ids
from nanoghost.tokenizer.reply_parser import parse_reply
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import CONVERSATION, TOY_TEMPLATE, toy_text


@pytest.fixture
def tokenizer():
    t = Tokenizer.train([toy_text()], 400)
    stop_ids = {t.special_id("<|im_end|>")}
    t.chat_template = jinja_template.ChatTemplate(TOY_TEMPLATE, {"eos_token": "<|im_end|>"}, stop_ids)
    return t


def test_special_token_text_in_a_message_stays_text(tokenizer):
    """Otherwise users could end their own turn and write the assistant's."""
    ids, _ = render(CONVERSATION, tokenizer)
    end = tokenizer.special_id("<|im_end|>")
    assert ids.count(end) == 5  # one for the system message that the template adds, one for each message
    assert tokenizer.decode(ids, skip_special=False) == jinja_template.render_template(TOY_TEMPLATE, CONVERSATION)


def test_loss_mask_covers_answers_with_their_stop_tokens(tokenizer):
    ids, mask = render(CONVERSATION, tokenizer)
    learned = [token for token, is_learned in zip(ids, mask) if is_learned]
    answers = tokenizer.decode(learned, skip_special=False)
    assert answers == "Good day.<|im_end|>The king sees the sea.<|im_end|>"


def test_generation_prompt_is_the_beginning_of_the_rendered_answer(tokenizer):
    ids, mask = render(CONVERSATION, tokenizer)
    prompt, _ = render(CONVERSATION[:3], tokenizer, add_generation_prompt=True)
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)]


def test_an_exception_that_a_template_raises_is_a_user_error(tokenizer):
    tokenizer.chat_template = replace(tokenizer.chat_template, source="{{ raise_exception('no system text') }}")
    with pytest.raises(UserError, match="no system text"):
        render(CONVERSATION, tokenizer)


def test_a_template_cannot_reach_python_internals(tokenizer):
    """Jinja's sandbox refuses attributes that lead out of the template."""
    tokenizer.chat_template = replace(tokenizer.chat_template, source="{{ ''.__class__.__mro__ }}")
    with pytest.raises(UserError):
        render(CONVERSATION, tokenizer)


def test_tool_calls_are_parsed_as_they_were_rendered(tokenizer):
    function = {"name": "calculator", "arguments": '{"expression": "1+2"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids, mask = render(messages, tokenizer)
    reply = [token for token, is_learned in zip(ids, mask) if is_learned]
    assert parse_reply(reply, tokenizer)["tool_calls"] == [call]


def test_ids_after_a_tool_result_continue_the_rendered_conversation(tokenizer):
    """Generation appends the result to the sequence instead of rendering the conversation again."""
    function = {"name": "calculator", "arguments": '{"expression": "1+2"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    ids, _ = render(messages, tokenizer)
    end_of_call = len(ids) - 1 - ids[::-1].index(tokenizer.special_id("<|im_end|>"))
    whole, _ = render([*messages, result], tokenizer, add_generation_prompt=True)
    assert ids[: end_of_call + 1] + tool_response_ids([result], tokenizer) == whole
