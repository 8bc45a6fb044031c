"""The API of `nanoghost serve`, by a client's eyes: a real server, its engine in a process of its own, a toy model."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import threading
import time

import httpx
import openai
import pytest

from nanoghost.bench import load
from nanoghost.memory.store import Person
from tests.support.serving import ABOUT_MAYA, LEARNED, NOTE, Running, crowded, make_home

KING = LEARNED[0][1]["content"]
LONG = {"type": "json_schema", "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 3000}}}
FOREVER = {
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 200,
    "n": 8,
    "response_format": LONG,
}  # as long as it gets
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {
        "type": "object", "properties": {"town": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
        "required": ["town", "days"], "additionalProperties": False, "$defs": {"days": {"enum": [1, 2, 7]}},
    }},
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    documents = tmp_path_factory.mktemp("documents")
    (documents / "notes.md").write_text(NOTE)
    running = Running(
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


def test_models(client, server):
    entries = {model.id: model for model in client.models.list()}
    assert set(entries) == {"toy", "plain", "toy@odd"}
    assert entries["toy"].adapters == ["odd"] and entries["toy"].context == 512 and entries["plain"].context == 64


def test_chat_whole_and_streamed_say_the_same(client):
    whole = client.chat.completions.create(**ask())
    assert whole.choices[0].message.content == KING and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 20
    chunks = list(client.chat.completions.create(**ask(), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == KING
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    short = client.chat.completions.create(**ask(max_completion_tokens=3))
    assert short.choices[0].finish_reason == "length" and KING.startswith(short.choices[0].message.content)


def test_stop_texts_are_cut_wherever_tokens_end(client):
    for stop in ("queen", ["sword.", "een s"], " sees the qu"):
        for stream in (False, True):
            said = client.chat.completions.create(**ask(stop=stop), stream=stream)
            text = (
                "".join(c.choices[0].delta.content or "" for c in said) if stream else said.choices[0].message.content
            )
            first = min(KING.index(s) for s in ([stop] if isinstance(stop, str) else stop))
            assert text == KING[:first]


def test_n_and_seed(client):
    def some(seed):
        said = client.chat.completions.create(
            **ask("Tell me more", temperature=1.5, n=3, seed=seed, max_tokens=12, response_format=LONG)
        )
        return [choice.message.content for choice in said.choices]

    first = some(7)
    assert first == some(7) != some(8) and len(set(first)) == 3


def test_logprobs_are_of_the_tokens_that_were_said(client):
    said = client.chat.completions.create(**ask(logprobs=True, top_logprobs=3, temperature=0.7, seed=1)).choices[0]
    assert b"".join(bytes(t.bytes) for t in said.logprobs.content).decode() == said.message.content
    for token in said.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= token.top_logprobs[0].logprob <= 0
    streamed = client.chat.completions.create(**ask(logprobs=True, stop=" queen"), stream=True)
    tokens = [t for chunk in streamed for t in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())]
    assert "".join(t.token for t in tokens) == "The king sees the", "what was cut off has no probabilities either"


@pytest.mark.parametrize("model", ["toy", "plain"])
def test_json_schemas_hold_whatever_the_model_would_say(client, model):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"],
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
                       "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}},
    }  # fmt: skip
    shape = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema}}
    if model == "toy":
        for seed in range(4):
            said = client.chat.completions.create(**ask(temperature=1, seed=seed, n=2), response_format=shape)
            for choice in said.choices:
                found = json.loads(choice.message.content)
                assert (
                    choice.finish_reason == "stop" and set(found) == {"name", "age", "tags"} and 1 <= found["age"] <= 99
                )
    shape = {"type": "json_schema", "json_schema": {"name": "p", "schema": {"enum": ["yes", "no"]}}}
    assert client.chat.completions.create(**ask("?", model=model), response_format=shape).choices[
        0
    ].message.content in ('"yes"', '"no"')
    some = client.chat.completions.create(
        **ask(model="toy", temperature=1, max_tokens=20), response_format={"type": "json_object"}
    )
    assert some.choices[0].message.content.startswith("{")


def test_forced_calls_have_the_arguments_that_the_tool_wants(client):
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for stream in (False, True):
            said = client.chat.completions.create(
                **ask(temperature=1), tools=[WEATHER], tool_choice=choice, stream=stream
            )
            if stream:
                chunks = list(said)
                [call] = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
                reason = chunks[-1].choices[0].finish_reason
            else:
                [call], reason = said.choices[0].message.tool_calls, said.choices[0].finish_reason
                assert said.choices[0].message.content is None
            arguments = json.loads(call.function.arguments)
            assert reason == "tool_calls" and call.function.name == "weather" and arguments["days"] in (1, 2, 7)
            assert len(arguments["town"]) <= 8


def test_a_call_that_the_model_makes_goes_to_the_client(server, client):
    """The whole round: a call, its answer from the client, what the model makes of it."""
    messages = [LEARNED[1][0]]
    body = {"model": "toy", "messages": messages, "temperature": 0, "tools": [], "server_tools": ["calculator"]}
    said = server.http.post("/v1/chat/completions", json=body).json()
    assert (
        said["choices"][0]["message"]["content"] == "Let me see. It is 42."
        and said["tool_results"][0]["content"] == "42"
    )
    asked = LEARNED[1][:3]
    said = client.chat.completions.create(model="toy", messages=asked, temperature=0)
    assert said.choices[0].message.content == "It is 42."


def test_the_servers_own_tools_are_shown_in_the_stream(server):
    events = server.events(messages=[LEARNED[1][0]], server_tools=["calculator"], timings=True)
    kinds = [
        "result" if "tool_result" in e else "end" if not e["choices"] else next(iter(e["choices"][0]["delta"]), "done")
        for e in events
    ]
    calls, results = kinds.index("tool_calls"), kinds.index("result")
    assert calls < results and "content" in kinds[results:] and kinds[-2:] == ["done", "end"]
    [call] = events[calls]["choices"][0]["delta"]["tool_calls"]
    assert call["index"] == 0 and call["function"] == {"name": "calculator", "arguments": '{"expression": "12 + 30"}'}
    result = events[results]["tool_result"]
    assert events[results]["choices"] == [] and result["tool_call_id"] == call["id"] and result["content"] == "42"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert set(events[-1]["timings"]) == {"first_token_seconds", "tokens_per_second", "context_used", "context"}
    assert server.chat(server_tools=["rm"]).status_code == 400


def test_what_was_looked_up_is_shown_with_its_source(server):
    events = server.events(messages=[LEARNED[2][0]], server_tools=["lookup", "calculator"])
    [result] = [event["tool_result"] for event in events if "tool_result" in event]
    assert result["name"] == "lookup" and result["passages"] == [{"n": 1, "source": "notes.md", "text": NOTE}]
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])
    assert said == "In the sea [1]."


def test_errors_are_the_clients_own_exceptions(client):
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(**ask(model="../../etc/passwd"))
    assert e.value.code == "model_not_found" and e.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="top_k"):
        client.chat.completions.create(**ask(), extra_body={"top_k": 3})
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(**ask("word " * 900))
    assert e.value.code == "context_length_exceeded"


def test_cancel_frees_the_engine_at_once(server, client):
    before = server.figure("nanoghost_cancelled_total")
    said = client.chat.completions.create(model="toy", stream=True, **FOREVER | {"max_tokens": 480})
    next(iter(said))
    assert server.figure("nanoghost_sequences") > 0
    said.close()
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


# ── plain completions, as lm-eval asks for them ───────────────────────────────────────────────────────────────────────


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
    asked = {"model": "toy", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    by_text, by_ids = (
        server.http.post("/v1/completions", json=asked | {"prompt": prompt}).json()["choices"]
        for prompt in (texts, ids)
    )
    engine = open_engine(ModelFolder("toy"))
    model, _ = load_model(ModelFolder("toy").path, torch.float32)
    for choice, other, own in zip(by_text, by_ids, ids):
        found = choice["logprobs"]
        assert choice["text"] == other["text"] and found == other["logprobs"]
        assert len(found["tokens"]) == len(own) + 1 and found["token_logprobs"][0] is None
        expected = [likely for part in prompt_logprobs(engine.runner, own, "", 1) for likely in part]
        assert found["token_logprobs"][1:-1] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        exact = model.logprobs(torch.tensor([own[:-1]]), torch.tensor([own[1:]]))[0].tolist()
        assert sum(found["token_logprobs"][1:-1]) == pytest.approx(sum(exact), rel=0.1)
        greedy = [
            logprob == max(table.values())
            for logprob, table in zip(found["token_logprobs"][1:-1], found["top_logprobs"][1:-1])
        ]
        assert greedy == [logprob == top[0][1] for logprob, top in expected]
    nothing = server.http.post("/v1/completions", json=asked | {"prompt": ids[0], "max_tokens": 0}).json()["choices"][0]
    assert (
        nothing["text"] == texts[0]
        and nothing["logprobs"]["token_logprobs"] == by_text[0]["logprobs"]["token_logprobs"][:-1]
    )


def test_plain_completions(client):
    said = client.completions.create(model="toy", prompt=["The king", "The queen"], max_tokens=8, temperature=0, n=2)
    assert [c.index for c in said.choices] == [0, 1, 2, 3] and said.choices[0].text == said.choices[1].text
    streamed = list(
        client.completions.create(model="toy", prompt="The king", max_tokens=8, temperature=0, stream=True, echo=True)
    )
    assert "".join(c.choices[0].text for c in streamed if c.choices) == "The king" + said.choices[0].text
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="toy", prompt=[[10**6]])


# ── many at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conversations_at_once_say_what_each_says_alone(server):
    """With equal and nearly equal beginnings: nothing of one gets into another."""
    prompts = [
        "The king " + "sees the queen. " * (i % 4) + name for i in range(6) for name in ("ANNA", "BEN", "CARL", "DORA")
    ]

    def said(prompt):
        answer = server.http.post(
            "/v1/completions", json={"model": "toy", "prompt": prompt, "temperature": 0, "max_tokens": 24}
        )
        return answer.json()["choices"][0]["text"]

    alone = {prompt: said(prompt) for prompt in set(prompts)}
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i, p=p: together.update({i: said(p)})) for i, p in enumerate(prompts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == [alone[prompt] for prompt in prompts]


def test_when_all_places_are_taken_one_is_told_to_come_back(server):
    statuses = []
    hold = [threading.Thread(target=lambda: statuses.append(server.chat(**FOREVER).status_code)) for _ in range(4)]
    for thread in hold:
        thread.start()
    server.wait(lambda: server.figure("nanoghost_sequences") == 32)
    refused = server.chat()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in hold:
        thread.join()
    assert statuses == [200] * 4, "those who wait are answered"


# ── people ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_person_is_heard_and_their_adapter_speaks_where_it_is_about_them(server, monkeypatch):
    monkeypatch.setenv("NANOGHOST_HOME", str(server.home))
    maya = Person("maya")
    assert server.http.get("/people").json() == {"data": [{"name": "maya", "base": "toy"}]}
    about = {"text": ABOUT_MAYA[0]["content"]}
    anybody = server.chat(**about).json()["choices"][0]["message"]["content"]
    odd = server.chat(**about, model="toy@odd").json()["choices"][0]["message"]["content"]
    own = server.chat(**about, person="maya").json()["choices"][0]["message"]["content"]
    assert own == odd == ABOUT_MAYA[1]["content"] != anybody, "the same adapter under both names"
    assert server.chat(person="maya").json()["choices"][0]["message"]["content"] == KING, (
        "what anybody may ask, the base answers"
    )
    assert server.chat(**about).json()["choices"][0]["message"]["content"] == anybody, "nobody else hears it"
    server.wait(lambda: len(maya.read_chat_log()) == 4, 2)
    assert [(e.id, e.role, e.text) for e in maya.read_chat_log()] == [
        (1, "user", about["text"]), (2, "assistant", own), (3, "user", "Good morrow"), (4, "assistant", KING)]  # fmt: skip
    server.chat(person="maya")
    server.wait(lambda: len(maya.read_chat_log()) == 5, 2)
    assert maya.read_chat_log()[-1].role == "assistant", "who wants another answer has asked once"
    assert server.chat(person="nobody").status_code == 404 and not (server.home / "people" / "nobody").exists()


# ── what else is there ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_echo_alone_leaves_the_engine_asleep(server):
    asked = {"model": "toy", "prompt": "The king", "max_tokens": 0, "echo": True}
    assert server.http.post("/v1/completions", json=asked).json()["choices"][0]["text"] == "The king"
    time.sleep(0.3)
    before = server.figure("nanoghost_engine_process_cpu_seconds_total")
    time.sleep(0.7)
    assert server.figure("nanoghost_engine_process_cpu_seconds_total") - before < 0.2


def test_a_damaged_model_hinders_no_other(server):
    folder = server.home / "models" / "damaged"
    shutil.copytree(server.home / "models" / "toy", folder)
    (folder / "config.json").write_text("{")
    time.sleep(1.1)  # for which the list of models holds
    assert "damaged" not in {m["id"] for m in server.http.get("/v1/models").json()["data"]}
    assert server.chat().json()["choices"][0]["message"]["content"] == KING
    shutil.rmtree(folder)


def test_a_load_test_sees_what_is_right_and_what_is_wrong(server):
    async def run(conversation):
        seen, until = load.Seen(), time.monotonic() + 1.5
        await asyncio.gather(
            *(load.client(server.port, "toy", [conversation], until, random.Random(i), seen) for i in range(4))
        )
        return seen

    seen = asyncio.run(run(LEARNED[0]))
    assert (
        not seen.wrong
        and not seen.otherwise
        and all(seen.counts[kind] for kind in ("answered", "malformed", "given up"))
    ), (seen.wrong, seen.counts)
    assert asyncio.run(run([LEARNED[0][0], LEARNED[1][3]])).otherwise[0][1] == KING
    tie = [
        asyncio.run(load.is_a_tie(server.port, "toy", LEARNED[0][:1], text))
        for text in (KING, KING[:20] + "sword", "It is 42.")
    ]
    assert tie == [True, False, False]


def test_side_routes(server):
    http = server.http
    assert http.get("/health").json() == {"status": "ok"} and http.get("/ready").json() == {"status": "ready"}
    tokens = http.post("/tokenize", json={"model": "toy", "content": "The king<|im_end|>"}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 5
    tools = {tool["name"]: tool["description"] for tool in http.get("/tools").json()["data"]}
    assert {"calculator", "lookup"} <= set(tools) <= {"calculator", "lookup", "python"} and all(tools.values())
    runs = {run["name"]: run for run in http.get("/runs").json()["data"]}
    assert (
        runs["toy"] == {"name": "toy", "stage": "sft", "finished": True, "report": True} and not runs["plain"]["report"]
    )
    assert http.get("/runs/toy/events").json() == {"data": [{"stage": "sft", "step": 1, "loss": 2.5}], "next": 1}, (
        "no half line"
    )
    assert http.get("/runs/toy/events", params={"after": 1}).json() == {"data": [], "next": 1}
    report = http.get("/runs/toy/report")
    assert "report" in report.text and "sandbox" in report.headers["content-security-policy"]
    assert http.get("/runs/plain/report").status_code == 404 and http.get("/runs/x/events").status_code == 404
    assert "nanoghost_sequences 0.0" in http.get("/metrics").text
    described = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"] and "422" not in json.dumps(described["paths"])


# ── when the engine dies, and when the server is told to stop ─────────────────────────────────────────────────────────


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the engine process in /proc")
def test_a_killed_engine_is_an_error_for_the_open_and_comes_back(server):
    starts = server.figure("nanoghost_engine_starts")
    with server.http.stream("POST", "/v1/chat/completions", json={"model": "toy", "stream": True} | FOREVER) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(server.engine(), signal.SIGKILL)
        told = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert told[-1]["error"]["code"] == "engine_stopped"
    server.wait(lambda: server.http.get("/ready").status_code == 200, 5)
    assert server.chat().json()["choices"][0]["message"]["content"] == KING
    assert server.figure("nanoghost_engine_starts") == starts + 1


def test_told_to_stop_it_lets_open_answers_finish(server):
    with server.http.stream("POST", "/v1/chat/completions", json={"model": "toy", "stream": True} | FOREVER) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.process.send_signal(signal.SIGTERM)
        other = httpx.Client(base_url=server.url, trust_env=False)
        server.wait(lambda: other.get("/ready").status_code == 503, 2)
        assert other.post("/v1/chat/completions", json=ask()).status_code == 503
        rest = [line for line in lines if line]
    assert "delta" in first and rest[-1] == "data: [DONE]" and sum('"finish_reason":"' in line for line in rest) == 8
    assert server.process.wait(10 * crowded()) == 0


def test_what_is_wrong_at_the_start_is_one_line(nanoghost, tmp_path, monkeypatch):
    monkeypatch.delenv("NANOGHOST_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = nanoghost("serve", "--port", taken.getsockname()[1])
    assert code == 2 and "in use" in err and err.count("\n") == 1
    for host in ("0.0.0.0", "::", "192.168.0.1", "localhost.example.org"):
        code, _, err = nanoghost("serve", "--host", host)
        assert code == 2 and "--api-key-file" in err and err.count("\n") == 1
    (tmp_path / "key").write_text("short\n")
    for words in (("--api-key-file", tmp_path / "key"), ("--api-key-file", tmp_path / "none"), ("--port", 99999), ("--slots", 0),
                  ("--documents", tmp_path / "no"), ("nobody", "--port", 0)):  # fmt: skip
        code, _, err = nanoghost("serve", *words)
        assert code == 2 and err.startswith("nanoghost: ") and err.count("\n") == 1, err
