"""What clients read when their request is refused, and the fields of OpenAI's client that are accepted."""

import re

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nanoghost.serve.schema import ChatRequest, CompletionRequest
from nanoghost.serve.validation_messages import NOT_SUPPORTED, explain

USER = {"role": "user", "content": "Hello"}
CHAT = {"model": "ghost", "messages": [USER]}
COMPLETION = {"model": "ghost", "prompt": "Hello"}
PYDANTIC_WORDS = re.compile(
    r"constrained|union|literal|Input should|ctx|pydantic|type=|StrictModel|dict\[|list\[", re.I
)


def explanation(model, body) -> tuple[str, str | None]:
    """(message, location) of the error as the server answers it. FastAPI puts "body" in front of each location."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors()]
    return explain(RequestValidationError(errors, body=body).errors(), body)


def message(**changes) -> dict:
    return {"messages": [USER | changes]}


def parts(*parts: dict) -> dict:
    return message(content=list(parts))


NO_CONTENT = "content of the type {} is not supported: the models here read text only"
ERRORS = [
    (message(content=5), "messages.0.content: expected a string or a list, got a number"),
    (parts({"type": "text", "text": 5}), "messages.0.content.0.text: expected a string, got a number"),
    (parts({"type": "image_url", "image_url": {}}), "messages.0.content.0.type: " + NO_CONTENT.format("'image_url'")),
    (parts({"type": "input_audio"}), "messages.0.content.0.type: " + NO_CONTENT.format("'input_audio'")),
    ({"messages": [{"content": "x"}]}, "messages.0.role is missing"),
    ({"messages": []}, "messages: expected at least 1 entries, got []"),
    ({"stop": [5]}, "stop.0: expected a string, got a number"),
    ({"n": 99}, "n: expected a number of at most 8, got 99"),
    ({"temperature": "hot"}, "temperature: expected a number, got a string"),
    ({"tool_choice": "maybe"}, "tool_choice: expected 'none', 'auto' or 'required' or an object, got 'maybe'"),
    (
        {"response_format": {"type": "yaml"}},
        "response_format.type: expected 'text', 'json_object' or 'json_schema', got 'yaml'",
    ),
    ({"colour": "blue"}, "colour is not a field that this server knows"),
    ({"top_logprobs": 2}, "top_logprobs requires logprobs"),
]


@pytest.mark.parametrize("change, expected", ERRORS, ids=[text.partition(" ")[0] for _, text in ERRORS])
def test_an_error_names_the_field_and_what_is_expected(change, expected):
    assert explanation(ChatRequest, CHAT | change)[0] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"logit_bias": {"50": 1}}, {"presence_penalty": 0.5}, {"frequency_penalty": -1}, {"functions": []},
        {"function_call": "auto"}, {"modalities": ["text", "audio"]}, {"audio": {"voice": "x"}},
        {"web_search_options": {}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_this_server_cannot_do_is_said_in_a_sentence(change):
    [field] = change
    assert explanation(ChatRequest, CHAT | change) == (NOT_SUPPORTED[field], field)


@pytest.mark.parametrize("change", [{"suffix": "end"}, {"best_of": 3}], ids=lambda change: next(iter(change)))
def test_what_completions_cannot_do_is_said_in_a_sentence(change):
    [field] = change
    assert explanation(CompletionRequest, COMPLETION | change) == (NOT_SUPPORTED[field], field)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from([-0.5, 1.5, 1e30]) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "role", "x"]), inner),
    max_leaves=4,
)


@pytest.mark.parametrize(
    "model, body", [(ChatRequest, CHAT), (CompletionRequest, COMPLETION)], ids=["chat", "completion"]
)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_no_error_speaks_the_language_of_the_library(model, body, data):
    """Any field with any value: either the request is valid, or the message names the field in plain words."""
    field = data.draw(st.sampled_from(sorted(model.model_fields)))
    changed = body | {field: data.draw(ANY_JSON)}
    try:
        model.model_validate(changed)
    except ValidationError:
        text, _ = explanation(model, changed)
        assert not PYDANTIC_WORDS.search(text) and "another value" not in text, text


def test_an_answer_of_openais_client_may_be_sent_back_as_it_is():
    """The client's own loops send `message.model_dump()`, after `parse` or a stream with what they have added."""
    function = {"name": "add", "arguments": '{"a": 1}', "parsed_arguments": {"a": 1}}
    call = {"id": "call_1", "type": "function", "index": 0, "function": function}
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None}
    answer |= {"function_call": None, "parsed": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "2"}
    request = ChatRequest.model_validate(CHAT | {"messages": [USER, answer, result]})
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert request.messages[1].to_chat_format()["tool_calls"] == [
        {"id": "call_1", "type": "function", "function": function}
    ]


@pytest.mark.parametrize(
    "hint",
    [
        {"metadata": {"run": "1"}}, {"store": True}, {"service_tier": "auto"}, {"safety_identifier": "x"},
        {"verbosity": "low"},
        {"prompt_cache_key": "x"}, {"reasoning_effort": "low"}, {"prediction": {"type": "content", "content": "x"}},
        {"logit_bias": {}}, {"presence_penalty": 0}, {"user": "me"}, {"parallel_tool_calls": True},
        {"modalities": ["text"]},
    ],
    ids=lambda hint: next(iter(hint)),
)  # fmt: skip
def test_fields_that_change_nothing_here_are_accepted(hint):
    ChatRequest.model_validate(CHAT | hint)
