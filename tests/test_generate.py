"""The engine: its cache, its distributions, its tools, on toy models in fp32."""

import json

import pytest
import torch

from nanoghost.engine.engine import Engine
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams, distribution, draw, uniform
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.errors import UserError
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools import registry
from tests.support.toys import toy_text


def run_tool(call):
    return registry.run_tool(call, registry.TOOLS)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


def toy_model(arch, tokenizer):
    torch.manual_seed(0)
    V = tokenizer.vocab_size
    if arch == "ghost":
        model = Ghost(GhostConfig(vocab_size=V, context=512, depth=2, width=64, head_width=32, bigram_rows=64))
    else:
        model = Llama(LlamaConfig(V, 512, 2, 64, 4, 2, 96))
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)  # what starts at zero would make the test blind
    model.set_character_features(tokenizer)
    return model


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_greedy_rows_equal_full_recomputation_alone_and_padded(arch, tokenizer):
    model = toy_model(arch, tokenizer)
    prompts = [tokenizer.encode(t) for t in ("The king", "The queen fears the ghost. The sea", "A")]
    rows = generate(model, tokenizer, prompts, SamplingParams(max_tokens=12, temperature=0))
    for prompt, row in zip(prompts, rows):
        ids = list(prompt)
        for _ in row.completion_ids:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == prompt + row.completion_ids


def test_stored_logprobs_are_those_of_full_recomputation(tokenizer):
    model = toy_model("ghost", tokenizer)
    prompts = [tokenizer.encode(t) for t in ("The king sees", "The")]
    rows = generate(model, tokenizer, prompts, SamplingParams(max_tokens=10, temperature=1.0, seed=3), samples=3)
    assert len(rows) == 6 and rows[0].completion_ids != rows[1].completion_ids
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logp = model.logprobs(ids[:, :-1], ids[:, 1:])[0, len(row.prompt_ids) - 1 :]
        assert torch.allclose(logp, torch.tensor(row.logprobs), atol=1e-4)
    again = generate(model, tokenizer, prompts, SamplingParams(max_tokens=10, temperature=1.0, seed=3), samples=3)
    assert [r.completion_ids for r in again] == [r.completion_ids for r in rows]


def test_distributions():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2
    plain = torch.softmax(logits, 1)
    assert torch.allclose(distribution(logits, SamplingParams(temperature=1.0)), plain)
    assert torch.allclose(distribution(logits, SamplingParams(temperature=0.5)), torch.softmax(logits * 2, 1))
    assert ((distribution(logits, SamplingParams(temperature=1.0, top_k=5)) > 0).sum(1) == 5).all()
    nucleus = distribution(logits, SamplingParams(temperature=1.0, top_p=0.7))
    for kept, p in zip(nucleus > 0, plain):
        assert p[kept].sum() >= 0.7 and p[kept].sum() - p[kept].min() < 0.7
    assert torch.allclose(nucleus.sum(1), torch.ones(50))
    greedy = distribution(logits, SamplingParams(temperature=0))
    assert (greedy.argmax(1) == logits.argmax(1)).all() and (greedy.max(1).values == 1).all()


def test_draws_follow_the_distribution():
    p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20000, 4)
    ids, logp = draw(p, [uniform(0, 7, i) for i in range(20000)])
    counts = torch.bincount(torch.tensor(ids), minlength=4) / 20000
    assert torch.allclose(counts, p[0], atol=0.015) and counts[1] == 0
    assert logp[0] == pytest.approx(float(p[0, ids[0]].log()))


class Scripted(torch.nn.Module):
    """A model that writes the given tokens, whatever it reads."""

    def __init__(self, tokenizer, script):
        super().__init__()
        self.inner = toy_model("ghost", tokenizer)
        self.config, self.script = self.inner.config, list(script)
        self.dtype, self.device = self.inner.dtype, self.inner.device

    def new_cache(self, rows, capacity):
        return self.inner.new_cache(rows, capacity)

    def forward(self, tokens, cache, last_B):
        logits = torch.full((len(tokens), 1, self.config.vocab_size), -50.0)
        logits[0, 0, self.script[int(cache.next_slots_B[0] + last_B[0]) + 1 - self.start]] = 50.0
        return logits


def test_a_tool_is_called_and_its_answer_is_read(tokenizer):
    call = {"type": "function", "function": {"name": "calculator", "arguments": json.dumps({"expression": "12+30"})}}
    question = {"role": "user", "content": "12+30?"}
    asked = {"role": "assistant", "content": "", "tool_calls": [call | {"id": "call_1"}]}
    told = {"role": "tool", "tool_call_id": "call_1", "content": "42"}
    said = {"role": "assistant", "content": "It is 42."}
    prompt, _ = render([question], tokenizer, generation=True)
    whole, learned = render([question, asked, told, said], tokenizer)
    model = Scripted(tokenizer, whole[len(prompt) :])
    model.start = len(prompt)
    [row] = generate(model, tokenizer, [prompt], SamplingParams(max_tokens=300, temperature=0), run_tool=run_tool)
    assert row.messages == [asked, told, said]
    assert prompt + row.completion_ids == whole[: len(prompt) + len(row.completion_ids)]
    assert row.sampled_mask == learned[len(prompt) : len(prompt) + len(row.completion_ids)]
    assert row.finish_reason == "stop"
    model.start = len(prompt)
    [row] = generate(model, tokenizer, [prompt], SamplingParams(max_tokens=300, temperature=0))
    assert row.messages == [asked], "without tools a call ends the answer"


def test_limits_and_stop_texts(tokenizer):
    model = toy_model("ghost", tokenizer)
    text = "The king sees the sea. More"
    prompt = tokenizer.encode("x")
    script = Scripted(tokenizer, tokenizer.encode(text))
    script.start = len(prompt)
    [row] = generate(script, tokenizer, [prompt], SamplingParams(max_tokens=40, temperature=0, stop=("sea",)))
    assert row.messages[-1]["content"] == "The king sees the " and row.finish_reason == "stop"
    [row] = generate(model, tokenizer, [prompt], SamplingParams(max_tokens=3, temperature=1.0))
    assert sum(row.sampled_mask) <= 3 and row.finish_reason in ("length", "stop")
    with pytest.raises(UserError, match="no room"):
        generate(model, tokenizer, [[5] * 512], SamplingParams())
    [row] = generate(model, tokenizer, [[5] * 504], SamplingParams(max_tokens=100, temperature=1.0))
    assert len(row.completion_ids) <= 9 and row.finish_reason


def called(tokenizer, result):
    """(prompt, ids of a call, the ids that the engine feeds in for its result)."""
    function = {"name": "calculator", "arguments": json.dumps({"expression": "1+1"})}
    question = {"role": "user", "content": "?"}
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    told = {"role": "tool", "tool_call_id": "call_1", "content": result}
    prompt = render([question], tokenizer, generation=True)[0]
    call = render([question, asked], tokenizer)[0][len(prompt) : -len(tokenizer.encode("\n"))]
    fed = render([question, asked, told], tokenizer, generation=True)[0][len(prompt) + len(call) :]
    return prompt, call, fed


def test_a_tools_answer_that_fills_the_context_is_no_message_of_the_models(tokenizer):
    result = "9" * 400
    prompt, call, fed = called(tokenizer, result)
    script = Scripted(tokenizer, call + fed)
    script.start = len(prompt)
    s = SamplingParams(max_tokens=len(call) + 8, temperature=0)
    [row] = generate(script, tokenizer, [prompt], s, run_tool=lambda call: result)
    assert [m["role"] for m in row.messages] == ["assistant", "tool"] and row.finish_reason == "length"


def test_a_call_with_the_last_token_is_not_answered(tokenizer):
    prompt, call, fed = called(tokenizer, "2")
    script = Scripted(tokenizer, call + fed + tokenizer.encode("It is 2."))
    script.start = len(prompt)
    [row] = generate(script, tokenizer, [prompt], SamplingParams(max_tokens=len(call), temperature=0), run_tool=run_tool)
    assert sum(row.sampled_mask) == len(call) == len(row.completion_ids)


@pytest.mark.parametrize("steps", [0, 1], ids=["waiting", "half read"])
def test_when_the_first_of_several_samples_is_cancelled_the_others_go_on(tokenizer, steps):
    model = toy_model("ghost", tokenizer)
    prompt, s = tokenizer.encode("The king sees the queen. The sea"), SamplingParams(max_tokens=5, temperature=1.0, seed=2)
    want = [row.completion_ids for row in generate(model, tokenizer, [prompt], s, samples=4)]
    engine = Engine(TorchRunner(model, 4, 64), tokenizer)
    engine.runner.token_budget = 6
    rows = engine.add(prompt, s, samples=4)
    for _ in range(steps):
        engine.step()
    engine.cancel(rows[2])
    engine.cancel(rows[0])
    while engine.has_unfinished:
        engine.step()
    assert [row.completion_ids for row in rows] == [[], want[1], [], want[3]]
