"""docs/api.md and nanoghost.api: the tables of the document are those of the code, its examples run, and the Python API
computes what the layers below it compute."""

import dataclasses
import json
import math
import re

import pytest
import torch

from nanoghost import api
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.serve import connection, guard, http_errors, schema
from nanoghost.serve.app import make_app
from nanoghost.serve.client import EngineClient
from nanoghost.serve.engine_messages import Capacity
from nanoghost.serve.http_errors import error_response
from nanoghost.serve.model_registry import ModelRegistry
from nanoghost.serve.openapi import ERROR_DESCRIPTIONS
from nanoghost.serve.server import ServeSettings
from nanoghost.serve.service import Service
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools.registry import available_tools
from tests.support.documents import DOCS, code_blocks, stated_output
from tests.support.toy_models import LLAMA
from tests.support.toys import random_llama_folder, toy_text

SENTENCE = "The king sees the sea. The queen fears the sword. " * 2
QUESTION = [{"role": "user", "content": "The king sees the"}]


@pytest.fixture
def toy_llama(home):
    """A Llama with random weights, of a size that runs in PyTorch."""
    tokenizer = Tokenizer.train([toy_text(300)], LLAMA.vocab_size)
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, context=256)
    return random_llama_folder("toy", config, tokenizer)


# ── the document: HTTP ───────────────────────────────────────────────────────────────────────────────────────────────


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    text = (DOCS / "api.md").read_text()
    return re.search(rf"^#+ {heading}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def first_column(heading: str) -> list[str]:
    return re.findall(r"^\| `(.+?)` \|", section(heading), re.MULTILINE)


def test_the_routes_are_those_of_the_server(home):
    registry = ModelRegistry(None, Capacity())
    app = make_app(Service(EngineClient(Capacity(), registry.default_ref, 1), registry, available_tools(None)))
    routes = set()
    for route in app.routes:
        methods = getattr(route, "methods", None) or {"GET"}  # mounted files have no methods
        routes |= {(method, route.path) for method in methods - {"HEAD"}}
    listed = re.findall(r"^\| ([A-Z]+) \| `(.+?)` \|", section("Routes"), re.MULTILINE)
    assert set(listed) == routes
    assert len(listed) == len(routes)


@pytest.mark.parametrize(
    "heading, request_class",
    [
        ("Chat completions", schema.ChatRequest),
        ("Messages", schema.Message),
        ("Completions", schema.CompletionRequest),
        ("Tokenize", schema.TokenizeRequest),
    ],
)
def test_the_fields_are_those_of_the_schema(heading, request_class):
    listed = first_column(heading)
    assert set(listed) == set(request_class.model_fields)
    assert len(listed) == len(set(listed))
    required = re.findall(r"^\| `(.+?)` \| .*Required \|$", section(heading), re.MULTILINE)
    assert set(required) == {name for name, field in request_class.model_fields.items() if field.is_required()}


def test_the_errors_are_those_of_the_server():
    listed = re.findall(r"^\| (\d+) \| `(\w+)` \|", section("Errors"), re.MULTILINE)
    assert {int(status) for status, _ in listed} == set(ERROR_DESCRIPTIONS)
    for status, error_type in listed:
        assert json.loads(error_response(int(status), "").body)["error"]["type"] == error_type


def test_the_limits_are_those_of_the_server():
    text = section("Limits") + section("Messages") + section("Chat completions") + section("Errors")
    limits = [
        ServeSettings.slots,
        ServeSettings.queue,
        ServeSettings.context,
        schema.MAX_MESSAGES,
        schema.MAX_TEXT,
        schema.MAX_TOOLS,
        schema.MAX_SCHEMA,
        schema.MAX_SCHEMA_DEPTH,
        schema.MAX_PATTERN,
        connection.MAX_CONNECTIONS,
        int(connection.HEADER_TIMEOUT),
        int(connection.STALL_TIMEOUT),
        guard.MAX_BODY,
        int(guard.BODY_TIMEOUT),
        http_errors.RETRY_SECONDS,
    ]
    for limit in limits:
        assert re.search(rf"(?<![\d,]){limit:,}(?!,?\d)", text), limit


def test_the_request_of_the_curl_example_is_valid():
    [block] = [block for block in code_blocks("api.md") if block.language == "sh"]
    body = re.search(r"-d '(.*)'", block.code)[1]
    assert schema.ChatRequest.model_validate_json(body).model == "smollm2"


# ── the document: Python ─────────────────────────────────────────────────────────────────────────────────────────────


def python_example(first_line: str) -> str:
    [code] = [block.code for block in code_blocks("api.md") if block.code.startswith(first_line + "\n")]
    return code


def test_the_short_example_runs(toy_llama, capsys):
    code = python_example("from nanoghost.api import load").replace("smollm2", "toy")
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_the_complete_example_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text(toy_text())
    monkeypatch.chdir(tmp_path)
    code = python_example("from nanoghost.api import UserError, load, train")
    toy_sizes = ("depth=2, batch=4, vocab_size=320, steps=2", "conversations=40, batch=2, steps=2")
    for toy_size in toy_sizes:
        assert "minutes=4" in code
        code = code.replace("minutes=4", toy_size, 1)
    exec(code, {})
    printed = capsys.readouterr().out
    assert "base: " in printed and "after SFT: " in printed
    assert printed.splitlines()[-1:] == stated_output(code.replace("    print(", "print("))[-1:]


def test_the_sampling_settings_are_those_of_the_engine():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section("Python"), re.MULTILINE)
    assert rows == [(field.name, str(field.default)) for field in dataclasses.fields(SamplingParams)]


def test_the_names_are_those_of_the_module():
    listed = {name.partition("(")[0].partition(".")[0] for name in first_column("Python")}
    assert set(api.__all__) - {"Score"} <= listed  # Score is explained with the method that returns it


# ── the Python API ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_several_prompts_give_the_completions_of_single_ones(toy_llama):
    model = api.load("toy", batch=2)
    conversations = [
        QUESTION,
        [{"role": "user", "content": "And?"}],
        QUESTION + [{"role": "assistant", "content": "sea"}],
    ]
    together = model.chat_batch(conversations, max_tokens=6, temperature=0)
    assert together == [model.chat(messages, max_tokens=6, temperature=0) for messages in conversations]
    prompts = ["The king", "A sword", "The sea sees"]
    together = model.generate_batch(prompts, max_tokens=6, temperature=0)
    assert together == [model.generate(prompt, max_tokens=6, temperature=0) for prompt in prompts]


def test_the_seed_decides_the_completion(toy_llama):
    model = api.load()
    first = model.generate("The king", max_tokens=12, temperature=1.0, seed=1)
    assert model.generate("The king", max_tokens=12, temperature=1.0, seed=1) == first
    assert model.generate("The king", max_tokens=12, temperature=1.0, seed=2) != first


def test_max_tokens_ends_a_completion(toy_llama):
    completion = api.load("toy").generate("The king", max_tokens=3, ignore_eos=True)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize("context", [256, 16], ids=["one window", "several windows"])
def test_score_is_the_bits_per_byte_of_the_evaluation(toy_llama, context):
    """Oracle: the model itself, and for a text of one window the evaluation. (Its windows do not share tokens.)"""
    score = api.load("toy", context=context).score(SENTENCE)
    model, tokenizer = load_model(toy_llama.path, torch.float32)
    ids = torch.tensor(tokenizer.encode(SENTENCE))
    assert len(score.logprobs) == len(ids) - 1
    expected = []
    for start in range(0, len(ids) - 1, context - 1):
        window = ids[start : start + context][None]
        expected += model.logprobs(window[:, :-1], window[:, 1:])[0].tolist()
    assert score.logprobs == pytest.approx(expected, abs=0.05)  # the model is in bf16 where the CPU has it
    scored_bytes = len(SENTENCE.encode()) - len(tokenizer.token_bytes(int(ids[0])))
    assert score.bits_per_byte == pytest.approx(-sum(score.logprobs) / math.log(2) / scored_bytes)
    if context > len(ids):
        of_evaluation = bits_per_byte(model, ids.numpy(), context, scored_bytes)
        assert score.bits_per_byte == pytest.approx(of_evaluation, abs=0.02)


def test_an_adapter_is_trained_and_loaded_by_its_full_name(toy_llama, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": [*QUESTION, {"role": "assistant", "content": "sea."}]}) + "\n")
    settings = {"parent": "toy", "name": "odd", "data": str(data), "lora": 4, "steps": 20}
    figures = api.train("sft", **settings)
    assert figures["name"] == "toy@odd"
    assert api.train("sft", **settings) is None
    assert ModelFolder("toy@odd").is_finished
    adapted, base = api.load("toy@odd").score(SENTENCE), api.load("toy").score(SENTENCE)
    assert adapted.bits_per_byte != base.bits_per_byte


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: api.load("nobody"), "does not exist"),
        (lambda model: model.generate(""), "empty"),
        (lambda model: model.generate("The king", max_token=3), "no setting 'max_token'"),
        (lambda model: model.generate("The king", max_tokens=0), "max_tokens"),
        (lambda model: model.generate("The king", top_p=0), "top_p"),
        (lambda model: model.generate("The king", stop="sea"), "list of texts"),
        (lambda model: model.generate("The king " * 300), "leaves no room"),
        (lambda model: model.chat([]), "at least one message"),
        (lambda model: model.chat("Hello"), "must be a list"),
        (lambda model: model.chat([{"role": "king", "content": "Hello"}]), "role 'king'"),
        (lambda model: model.score("a"), "fewer than two tokens"),
        (lambda model: api.train("pretraining"), "unknown stage"),
        (lambda model: api.train("sft", step=3), "sft has no setting 'step'"),
        (lambda model: api.train("sft", parent="nobody", steps=3), "does not exist"),
    ],
)
def test_a_mistake_raises_a_user_error(toy_llama, call, message):
    with pytest.raises(UserError, match=message):
        call(api.load("toy"))


def test_a_call_after_a_mistake_is_not_affected(toy_llama):
    model = api.load("toy")
    with pytest.raises(UserError):
        model.generate_batch(["The king", "The king " * 300])
    assert not model.engine.has_unfinished
    expected = api.load("toy").generate("The king", max_tokens=4, temperature=0)
    assert model.generate("The king", max_tokens=4, temperature=0) == expected
