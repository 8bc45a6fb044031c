"""The API of `nanoghost serve` as clients use it: a real server process with its engine process and a toy model."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from typing import Literal

import httpx
import openai
import pydantic
import pytest

from nanoghost.bench import load
from nanoghost.memory.store import Person
from tests.support.serving import ABOUT_MAYA, MEMORIZED, NOTE, ServerProcess, crowded, make_home

KING = MEMORIZED[0][1]["content"]
LONG = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 3000}}}
FOREVER = {
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 200,
    "n": 8,
    "response_format": LONG,
}  # generates until the context is full
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
            "required": ["town", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"enum": [1, 2, 7]}},
        },
    },
}


class Weather(pydantic.BaseModel):
    days: Literal[1, 2, 7]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    documents = tmp_path_factory.mktemp("documents")
    (documents / "notes.md").write_text(NOTE)
    running = ServerProcess(
        make_home(tmp_path_factory.mktemp("served")), "toy", "--slots", 24, "--queue", 8, "--documents", documents
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    )


def ask(text: str = "Good morrow", **fields) -> dict:
    return {"model": "toy", "messages": [{"role": "user", "content": text}], "temperature": 0} | fields


# ── the openai client, unmodified ─────────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_with_their_adapters_and_context(client, server):
    entries = {model.id: model for model in client.models.list()}
    assert set(entries) == {"toy", "plain", "toy@odd"}
    assert entries["toy"].adapters == ["odd"]
    assert entries["toy"].context == 512
    assert entries["plain"].context == 64


def test_one_model_can_be_asked_for(client):
    assert client.models.retrieve("toy").adapters == ["odd"]
    assert client.models.retrieve("toy@odd").id == "toy@odd"
    with pytest.raises(openai.NotFoundError) as e:
        client.models.retrieve("nobody/nothing")
    assert e.value.code == "model_not_found"


@pytest.mark.parametrize("way", ["create", "parse", "stream"])
def test_a_message_of_the_client_can_be_sent_back(client, way):
    """A loop of tool calls with the client's own objects, which hold more fields than the API needs."""
    completions = client.chat.completions
    tool = openai.pydantic_function_tool(Weather)
    request = ask(temperature=1, tools=[tool], tool_choice="required", metadata={"run": "1"}, store=False)
    if way == "stream":
        with completions.stream(**request) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = getattr(completions, way)(**request).choices[0].message
    [call] = message.tool_calls
    if way != "create":
        assert isinstance(call.function.parsed_arguments, Weather)
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    for sent in (message, message.model_dump(), message.model_dump(exclude_unset=True)):
        answer = completions.create(model="toy", messages=[*request["messages"], sent, result], max_tokens=4)
        assert answer.choices[0].message.role == "assistant"


def test_a_parsed_reply_can_be_sent_back(client):
    message = client.chat.completions.parse(**ask(temperature=1), response_format=Weather).choices[0].message
    assert isinstance(message.parsed, Weather)
    messages = [*ask()["messages"], message, {"role": "user", "content": "And tomorrow?"}]
    for sent in (messages, [m if isinstance(m, dict) else m.model_dump() for m in messages]):
        assert client.chat.completions.create(model="toy", messages=sent, max_tokens=4).choices


def test_a_streamed_reply_equals_the_complete_one(client):
    whole = client.chat.completions.create(**ask())
    assert whole.choices[0].message.content == KING
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 20
    chunks = list(client.chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == KING
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    short = client.chat.completions.create(**ask(max_completion_tokens=3))
    assert short.choices[0].finish_reason == "length"
    assert KING.startswith(short.choices[0].message.content)


def test_stop_texts_are_cut_even_inside_a_token(client):
    for stop, expected in (
        ("queen", "The king sees the "),
        (["sword.", "een s"], "The king sees the queen, and the qu"),
        (" sees the qu", "The king"),
    ):
        response = client.chat.completions.create(**ask(stop=stop))
        assert response.choices[0].message.content == expected
        chunks = client.chat.completions.create(**ask(stop=stop), stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_samples_differ_and_a_seed_repeats_them(client):
    def sample(seed):
        response = client.chat.completions.create(
            **ask("Tell me more", temperature=1.5, n=3, seed=seed, max_tokens=12, response_format=LONG)
        )
        return [choice.message.content for choice in response.choices]

    first = sample(7)
    assert first == sample(7) != sample(8)
    assert len(set(first)) == 3


def test_logprobs_cover_exactly_the_tokens_of_the_text(client):
    response = client.chat.completions.create(**ask(logprobs=True, top_logprobs=3, temperature=0.7, seed=1)).choices[0]
    assert b"".join(bytes(t.bytes) for t in response.logprobs.content).decode() == response.message.content
    for token in response.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= token.top_logprobs[0].logprob <= 0
    streamed = client.chat.completions.create(**ask(logprobs=True, stop=" queen"), stream=True)
    tokens = [t for chunk in streamed for t in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())]
    assert "".join(t.token for t in tokens) == "The king sees the", "no log-probabilities for the text that was cut off"


@pytest.mark.parametrize("model", ["toy", "plain"])
def test_replies_follow_a_json_schema(client, model):
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name", "age", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2},
        },
    }
    shape = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    if model == "toy":
        for seed in range(4):
            response = client.chat.completions.create(**ask(temperature=1, seed=seed, n=2), response_format=shape)
            for choice in response.choices:
                value = json.loads(choice.message.content)
                assert choice.finish_reason == "stop"
                assert set(value) == {"name", "age", "tags"}
                assert 1 <= value["age"] <= 99
    shape = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"enum": ["yes", "no"]}}}
    response = client.chat.completions.create(**ask("?", model=model), response_format=shape)
    assert response.choices[0].message.content in ('"yes"', '"no"')
    json_object = client.chat.completions.create(
        **ask(model="toy", temperature=1, max_tokens=20), response_format={"type": "json_object"}
    )
    assert json_object.choices[0].message.content.startswith("{")


def test_forced_calls_follow_the_schema_of_the_function(client):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for stream in (False, True):
            response = client.chat.completions.create(
                **ask(temperature=1), tools=[WEATHER], tool_choice=choice, stream=stream
            )
            if stream:
                chunks = list(response)
                [call] = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
                reason = chunks[-1].choices[0].finish_reason
            else:
                [call], reason = response.choices[0].message.tool_calls, response.choices[0].finish_reason
                assert response.choices[0].message.content is None
            arguments = json.loads(call.function.arguments)
            assert reason == "tool_calls"
            assert call.function.name == "weather"
            assert arguments["days"] in (1, 2, 7)
            assert len(arguments["town"]) <= 8


def test_a_tool_call_can_be_run_by_the_server_or_by_the_client(server, client):
    """The server runs the calculator; or the client sends the result as a tool message."""
    messages = [MEMORIZED[1][0]]
    body = {"model": "toy", "messages": messages, "temperature": 0, "tools": [], "server_tools": ["calculator"]}
    response = server.http.post("/v1/chat/completions", json=body).json()
    assert response["choices"][0]["message"]["content"] == "Let me see. It is 42."
    assert response["tool_results"][0]["content"] == "42"
    messages_with_result = MEMORIZED[1][:3]
    response = client.chat.completions.create(model="toy", messages=messages_with_result, temperature=0)
    assert response.choices[0].message.content == "It is 42."


def test_a_stream_contains_tool_calls_and_their_results(server):
    events = server.events(messages=[MEMORIZED[1][0]], server_tools=["calculator"], timings=True)
    kinds = [
        "result" if "tool_result" in e else "end" if not e["choices"] else next(iter(e["choices"][0]["delta"]), "done")
        for e in events
    ]
    calls, results = kinds.index("tool_calls"), kinds.index("result")
    assert calls < results
    assert "content" in kinds[results:]
    assert kinds[-2:] == ["done", "end"]
    [call] = events[calls]["choices"][0]["delta"]["tool_calls"]
    assert call["index"] == 0
    assert call["function"] == {"name": "calculator", "arguments": '{"expression": "12 + 30"}'}
    result = events[results]["tool_result"]
    assert events[results]["choices"] == []
    assert result["tool_call_id"] == call["id"]
    assert result["content"] == "42"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert set(events[-1]["timings"]) == {"first_token_seconds", "tokens_per_second", "context_used", "context"}
    assert server.chat(server_tools=["rm"]).status_code == 400


@pytest.mark.parametrize("fields", [{"server_tools": ["calculator"]}, {"server_tools": []}], ids=["tools", "no tools"])
def test_the_page_gets_no_json_of_a_cut_call(server, client, fields):
    """It names the tools of the server, even if they are none. Other clients get the text of the call as content."""
    messages = [MEMORIZED[1][0]]
    whole = client.chat.completions.create(model="toy", messages=messages, temperature=0)
    limit = whole.usage.completion_tokens - 6
    body = {"model": "toy", "messages": messages, "temperature": 0, "max_tokens": limit}
    [choice] = server.http.post("/v1/chat/completions", json=body | fields).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].strip() == "Let me see."
    [choice] = server.http.post("/v1/chat/completions", json=body).json()["choices"]
    assert '{"name": "calculator", ' in choice["message"]["content"]


def test_lookup_results_include_their_passages(server):
    events = server.events(messages=[MEMORIZED[2][0]], server_tools=["lookup", "calculator"])
    [result] = [event["tool_result"] for event in events if "tool_result" in event]
    assert result["name"] == "lookup"
    assert result["passages"] == [{"n": 1, "source": "notes.md", "text": NOTE}]
    response = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert response == "In the sea [1]."


def test_errors_become_exceptions_of_the_openai_client(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(**ask(model="../../etc/passwd"))
    assert e.value.code == "model_not_found"
    assert e.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.chat.completions.create(**ask(), extra_body={"top_k": 3})
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(**ask("word " * 900))
    assert e.value.code == "context_length_exceeded"


def test_disconnecting_cancels_generation(server, client):
    before = server.figure("nanoghost_cancelled_total")
    response = client.chat.completions.create(model="toy", stream=True, **FOREVER | {"max_tokens": 480})
    next(iter(response))
    assert server.figure("nanoghost_sequences") > 0
    response.close()
    server.wait(lambda: server.figure("nanoghost_sequences") == 0, 2)

    async def leave():
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.post(
                    "/v1/chat/completions", json={"model": "toy"} | FOREVER | {"max_tokens": 480}, timeout=0.1
                )

    asyncio.run(leave())
    server.wait(lambda: server.figure("nanoghost_sequences") == 0, 2)
    assert server.figure("nanoghost_cancelled_total") >= before + 1


# ── plain completions, as lm-eval uses them ───────────────────────────────────────────────────────────────────────────


def test_echo_gives_the_log_probability_of_every_token(server, monkeypatch, tmp_path):
    import torch

    from nanoghost.engine.engine import open_engine
    from nanoghost.engine.prompt_logprobs import prompt_logprobs
    from nanoghost.formats.model_folder import load_model, load_tokenizer
    from nanoghost.home import ModelFolder

    monkeypatch.setenv("NANOGHOST_HOME", str(server.home))
    tokenizer = load_tokenizer(ModelFolder("toy").path)
    texts = ["The king sees the queen.", "ANNA.\nThe ghost"]
    ids = [tokenizer.encode(text) for text in texts]
    body = {"model": "toy", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    by_text, by_ids = (
        server.http.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"] for prompt in (texts, ids)
    )
    engine = open_engine(ModelFolder("toy"))
    model, _ = load_model(ModelFolder("toy").path, torch.float32)
    for choice, other, token_ids in zip(by_text, by_ids, ids):
        logprobs = choice["logprobs"]
        assert choice["text"] == other["text"]
        assert logprobs == other["logprobs"]
        assert len(logprobs["tokens"]) == len(token_ids) + 1
        assert logprobs["token_logprobs"][0] is None
        expected = [logprob for part in prompt_logprobs(engine.runner, tokenizer, token_ids, "", 1) for logprob in part]
        assert logprobs["token_logprobs"][1:-1] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        exact = model.logprobs(torch.tensor([token_ids[:-1]]), torch.tensor([token_ids[1:]]))[0].tolist()
        assert sum(logprobs["token_logprobs"][1:-1]) == pytest.approx(sum(exact), rel=0.1)
        greedy = [
            logprob == max(table.values())
            for logprob, table in zip(logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1])
        ]
        assert greedy == [logprob == top[0][1] for logprob, top in expected]
    response = server.http.post("/v1/completions", json=body | {"prompt": ids[0], "max_tokens": 0}).json()
    [echo_only] = response["choices"]
    assert echo_only["text"] == texts[0]
    assert echo_only["logprobs"]["token_logprobs"] == by_text[0]["logprobs"]["token_logprobs"][:-1]


def test_plain_completions_of_several_prompts(client):
    response = client.completions.create(
        model="toy", prompt=["The king", "The queen"], max_tokens=8, temperature=0, n=2
    )
    assert [c.index for c in response.choices] == [0, 1, 2, 3]
    assert response.choices[0].text == response.choices[1].text
    streamed = list(
        client.completions.create(model="toy", prompt="The king", max_tokens=8, temperature=0, stream=True, echo=True)
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == "The king" + response.choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="toy", prompt=[[10**6]])


# ── concurrency ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_concurrent_requests_get_the_same_text_as_alone(server):
    """The prompts share prefixes: no request may see keys and values of another one's tokens."""
    prompts = [
        "The king " + "sees the queen. " * (i % 4) + name for i in range(6) for name in ("ANNA", "BEN", "CARL", "DORA")
    ]

    def complete(prompt):
        answer = server.http.post(
            "/v1/completions", json={"model": "toy", "prompt": prompt, "temperature": 0, "max_tokens": 24}
        )
        return answer.json()["choices"][0]["text"]

    alone = {prompt: complete(prompt) for prompt in set(prompts)}
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: together.update({i: complete(p)})) for i, p in enumerate(prompts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == [alone[prompt] for prompt in prompts]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the engine process in /proc")
def test_a_full_queue_gets_status_429(server):
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(server.chat(**FOREVER).status_code)) for _ in range(4)]
    engine = server.engine()
    os.kill(engine, signal.SIGSTOP)  # so that no sequence is finished before the last request
    try:
        for thread in threads:
            thread.start()
        server.wait(lambda: server.figure("nanoghost_sequences") == 32)
        rejected = server.chat()
    finally:
        os.kill(engine, signal.SIGCONT)
    assert rejected.status_code == 429
    assert int(rejected.headers["retry-after"]) > 0
    assert rejected.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4, "waiting requests are completed"


# ── people ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_person_gets_their_adapter_only_for_questions_about_themselves(server, monkeypatch):
    monkeypatch.setenv("NANOGHOST_HOME", str(server.home))
    maya = Person("maya")
    assert server.http.get("/people").json() == {"data": [{"name": "maya", "base": "toy"}]}
    about = {"text": ABOUT_MAYA[0]["content"]}
    anybody = server.chat(**about).json()["choices"][0]["message"]["content"]
    odd = server.chat(**about, model="toy@odd").json()["choices"][0]["message"]["content"]
    personal = server.chat(**about, person="maya").json()["choices"][0]["message"]["content"]
    assert personal == odd == ABOUT_MAYA[1]["content"] != anybody, "the same adapter under both names"
    assert server.chat(person="maya").json()["choices"][0]["message"]["content"] == KING, (
        "a general question is answered by the base model"
    )
    assert server.chat(**about).json()["choices"][0]["message"]["content"] == anybody, (
        "requests without the person are unaffected"
    )
    server.wait(lambda: len(maya.read_chat_log()) == 4, 2)
    assert [(e.id, e.role, e.text) for e in maya.read_chat_log()] == [
        (1, "user", about["text"]),
        (2, "assistant", personal),
        (3, "user", "Good morrow"),
        (4, "assistant", KING),
    ]
    server.chat(person="maya")
    server.wait(lambda: len(maya.read_chat_log()) == 5, 2)
    assert maya.read_chat_log()[-1].role == "assistant", "a repeated message is logged once"
    assert server.chat(person="nobody").status_code == 404
    assert not (server.home / "people" / "nobody").exists()


# ── other routes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_echo_without_generation_does_not_wake_the_engine(server):
    body = {"model": "toy", "prompt": "The king", "max_tokens": 0, "echo": True}
    assert server.http.post("/v1/completions", json=body).json()["choices"][0]["text"] == "The king"
    time.sleep(0.3)
    before = server.figure("nanoghost_engine_process_cpu_seconds_total")
    time.sleep(0.7)
    assert server.figure("nanoghost_engine_process_cpu_seconds_total") - before < 0.2


def test_a_damaged_model_does_not_affect_others(server):
    folder = server.home / "models" / "damaged"
    shutil.copytree(server.home / "models" / "toy", folder)
    (folder / "config.json").write_text("{")
    time.sleep(1.1)  # until the list of models is read again
    assert "damaged" not in {m["id"] for m in server.http.get("/v1/models").json()["data"]}
    assert server.chat().json()["choices"][0]["message"]["content"] == KING
    shutil.rmtree(folder)


def test_the_load_test_detects_wrong_replies(server):
    async def run(conversation):
        stats = load.LoadStats()
        until = time.monotonic() + 1.5
        clients = [
            load.run_client(server.port, "toy", [conversation], until, random.Random(i), stats) for i in range(4)
        ]
        await asyncio.gather(*clients)
        return stats

    stats = asyncio.run(run(MEMORIZED[0]))
    assert not stats.errors
    assert not stats.mismatches
    assert all(stats.counts[kind] for kind in ("complete", "malformed", "cancelled")), stats.counts
    assert asyncio.run(run([MEMORIZED[0][0], MEMORIZED[1][3]])).mismatches[0][1] == KING
    for text, is_tie in ((KING, True), (KING[:20] + "sword", False), ("It is 42.", False)):
        assert asyncio.run(load.is_tie(server.port, "toy", MEMORIZED[0][:1], text)) == is_tie


def test_status_routes(server):
    http = server.http
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    tokens = http.post("/tokenize", json={"model": "toy", "content": "The king<|im_end|>"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 5
    tools = {tool["name"]: tool["description"] for tool in http.get("/tools").json()["data"]}
    assert {"calculator", "lookup"} <= set(tools) <= {"calculator", "lookup", "python"}
    assert all(tools.values())
    runs = {run["name"]: run for run in http.get("/runs").json()["data"]}
    assert runs["toy"] == {"name": "toy", "stage": "sft", "finished": True, "report": True}
    assert not runs["plain"]["report"]
    assert http.get("/runs/toy/events").json() == {"data": [{"stage": "sft", "step": 1, "loss": 2.5}], "next": 1}, (
        "an incomplete last line is not returned"
    )
    assert http.get("/runs/toy/events", params={"after": 1}).json() == {"data": [], "next": 1}
    report = http.get("/runs/toy/report")
    assert "report" in report.text
    assert "sandbox" in report.headers["content-security-policy"]
    assert http.get("/runs/plain/report").status_code == 404
    assert http.get("/runs/x/events").status_code == 404
    assert "nanoghost_sequences 0.0" in http.get("/metrics").text
    described = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]
    assert "422" not in json.dumps(described["paths"])


# ── engine failures, shutdown and start ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the engine process in /proc")
def test_a_killed_engine_fails_open_requests_and_restarts(server):
    starts = server.figure("nanoghost_engine_starts")
    with server.http.stream("POST", "/v1/chat/completions", json={"model": "toy", "stream": True} | FOREVER) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.engine(), signal.SIGKILL)
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert chunks[-1]["error"]["code"] == "engine_stopped"
    server.wait(lambda: server.http.get("/ready").status_code == 200, 5)
    assert server.chat().json()["choices"][0]["message"]["content"] == KING
    assert server.figure("nanoghost_engine_starts") == starts + 1


def test_stopping_the_server_completes_open_requests(server):
    with server.http.stream("POST", "/v1/chat/completions", json={"model": "toy", "stream": True} | FOREVER) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        other = httpx.Client(base_url=server.url, trust_env=False)
        server.wait(lambda: other.get("/ready").status_code == 503, 2)
        assert other.post("/v1/chat/completions", json=ask()).status_code == 503
        rest = [line for line in lines if line]
    assert "delta" in first
    assert rest[-1] == "data: [DONE]"
    assert sum('"finish_reason":"' in line for line in rest) == 8
    assert server.process.wait(10 * crowded()) == 0


def test_bad_settings_are_one_line_errors(nanoghost, tmp_path, monkeypatch):
    monkeypatch.delenv("NANOGHOST_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = nanoghost("serve", "--port", taken.getsockname()[1])
    assert code == 2
    assert "in use" in err
    assert err.count("\n") == 1
    for host in ("0.0.0.0", "::", "192.168.0.1", "localhost.example.org"):
        code, _, err = nanoghost("serve", "--host", host)
        assert code == 2
        assert "--api-key-file" in err
        assert err.count("\n") == 1
    (tmp_path / "key").write_text("short\n")
    for words in (
        ("--api-key-file", tmp_path / "key"),
        ("--api-key-file", tmp_path / "none"),
        ("--port", 99999),
        ("--slots", 0),
        ("--documents", tmp_path / "no"),
        ("nobody", "--port", 0),
    ):
        code, _, err = nanoghost("serve", *words)
        assert code == 2
        assert err.startswith("nanoghost: ")
        assert err.count("\n") == 1, err
