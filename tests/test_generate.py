"""The engine on toy models in PyTorch: cache, log-probabilities, stop conditions, tools, cancelling."""

import json
from dataclasses import replace

import pytest
import torch

from nanoghost.engine.engine import Engine
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools import registry
from tests.support.engine_toys import ScriptedModel, toy_model
from tests.support.toys import toy_text


def run_tool(call):
    return registry.run_tool(call, registry.TOOLS)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["ghost", "llama"])
def test_greedy_tokens_equal_those_without_a_cache(arch, tokenizer):
    """In a batch of prompts of different lengths, which are padded."""
    model = toy_model(arch, tokenizer)
    prompts = [tokenizer.encode(t) for t in ("The king", "The queen fears the ghost. The sea", "A")]
    sequences = generate(model, tokenizer, prompts, SamplingParams(max_tokens=12, temperature=0))
    for prompt, sequence in zip(prompts, sequences):
        ids = list(prompt)
        for _ in sequence.completion_ids:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == sequence.token_ids


SAMPLING = SamplingParams(max_tokens=10, temperature=1.0, seed=3)


def test_logprobs_of_samples_equal_those_without_a_cache(tokenizer):
    model = toy_model("ghost", tokenizer)
    prompts = [tokenizer.encode(t) for t in ("The king sees", "The")]
    sequences = generate(model, tokenizer, prompts, SAMPLING, samples=3)
    assert len(sequences) == 6
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        logprobs = model.logprobs(ids[:, :-1], ids[:, 1:])[0, len(sequence.prompt_ids) - 1 :]
        assert torch.allclose(logprobs, torch.tensor(sequence.logprobs), atol=1e-4)


def test_samples_differ_and_a_seed_repeats_them(tokenizer):
    model = toy_model("ghost", tokenizer)
    prompts = [tokenizer.encode(t) for t in ("The king sees", "The")]
    first, again = (
        [sequence.completion_ids for sequence in generate(model, tokenizer, prompts, SAMPLING, samples=3)]
        for _ in range(2)
    )
    assert first[0] != first[1]
    assert again == first


@pytest.mark.parametrize("token_budget", [6, 7, 12])
def test_chunks_of_prompts_change_no_tokens(tokenizer, token_budget):
    """With 6, the first chunk of the second prompt is a single token: it must not count as a decoding sequence."""
    model = toy_model("ghost", tokenizer)
    words = tokenizer.encode(toy_text(5))
    prompts = [words[:5], words[5:25], words[25:37]]
    sampling = SamplingParams(max_tokens=5, temperature=0)
    expected = [sequence.completion_ids for sequence in generate(model, tokenizer, prompts, sampling)]
    runner = TorchRunner(model, 3, 64)
    runner.token_budget = token_budget
    chunked = generate(runner, tokenizer, prompts, sampling)
    assert [sequence.completion_ids for sequence in chunked] == expected


# -- stop conditions --------------------------------------------------------------------------------------------------


def test_a_stop_text_ends_the_completion_and_is_cut_off(tokenizer):
    prompt = tokenizer.encode("x")
    model = ScriptedModel(tokenizer, prompt, tokenizer.encode("The king sees the sea. More"))
    sampling = SamplingParams(max_tokens=40, temperature=0, stop=("sea",))
    [sequence] = generate(model, tokenizer, [prompt], sampling)
    assert sequence.messages[-1]["content"] == "The king sees the "
    assert sequence.finish_reason == "stop"


def test_max_tokens_ends_the_completion(tokenizer):
    sampling = SamplingParams(max_tokens=3, temperature=1.0)
    [sequence] = generate(toy_model("ghost", tokenizer), tokenizer, [tokenizer.encode("x")], sampling)
    assert sum(sequence.sampled_mask) <= 3
    assert sequence.finish_reason in ("length", "stop")


def test_a_prompt_that_fills_the_context_is_refused(tokenizer):
    with pytest.raises(UserError, match="no room"):
        generate(toy_model("ghost", tokenizer), tokenizer, [[5] * 512], SamplingParams())


def test_the_end_of_the_context_ends_the_completion(tokenizer):
    sampling = SamplingParams(max_tokens=100, temperature=1.0)
    [sequence] = generate(toy_model("ghost", tokenizer), tokenizer, [[5] * 504], sampling)
    assert len(sequence.completion_ids) <= 9
    assert sequence.finish_reason


# -- tools ------------------------------------------------------------------------------------------------------------


def calculator_call(expression: str) -> dict:
    """An assistant's message that calls the calculator."""
    function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    call = {"type": "function", "function": function, "id": "call_1"}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool_message(result: str) -> dict:
    return {"role": "tool", "tool_call_id": "call_1", "content": result}


@pytest.fixture
def tool_conversation(tokenizer):
    """(prompt, ids of the whole conversation, its loss mask, the assistant's and the tool's messages)."""
    question = {"role": "user", "content": "12+30?"}
    messages = [calculator_call("12+30"), tool_message("42"), {"role": "assistant", "content": "It is 42."}]
    prompt, _ = render([question], tokenizer, add_generation_prompt=True)
    ids, loss_mask = render([question, *messages], tokenizer)
    return prompt, ids, loss_mask, messages


def test_a_tool_is_run_and_the_model_reads_its_result(tokenizer, tool_conversation):
    """The tokens are those of the rendered conversation, and the sampled ones those that training would learn."""
    prompt, ids, loss_mask, messages = tool_conversation
    model = ScriptedModel(tokenizer, prompt, ids[len(prompt) :])
    sampling = SamplingParams(max_tokens=300, temperature=0)
    [sequence] = generate(model, tokenizer, [prompt], sampling, run_tool=run_tool)
    assert sequence.messages == messages
    length = len(sequence.token_ids)
    assert sequence.token_ids == ids[:length]
    assert sequence.sampled_mask == loss_mask[len(prompt) : length]
    assert sequence.finish_reason == "stop"


def test_without_tools_a_call_ends_the_completion(tokenizer, tool_conversation):
    prompt, ids, _, messages = tool_conversation
    model = ScriptedModel(tokenizer, prompt, ids[len(prompt) :])
    [sequence] = generate(model, tokenizer, [prompt], SamplingParams(max_tokens=300, temperature=0))
    assert sequence.messages == messages[:1]


def call_and_result_ids(tokenizer, result: str) -> tuple[list[int], list[int], list[int]]:
    """(prompt, ids of a call, ids that the engine appends for its result)."""
    question, call = {"role": "user", "content": "?"}, calculator_call("1+1")
    prompt = render([question], tokenizer, add_generation_prompt=True)[0]
    call_ids = render([question, call], tokenizer)[0][len(prompt) : -len(tokenizer.encode("\n"))]
    conversation = render([question, call, tool_message(result)], tokenizer, add_generation_prompt=True)[0]
    return prompt, call_ids, conversation[len(prompt) + len(call_ids) :]


def test_a_tool_result_that_fills_the_context_is_not_taken_for_a_message_of_the_model(tokenizer):
    result = "9" * 400
    prompt, call_ids, result_ids = call_and_result_ids(tokenizer, result)
    model = ScriptedModel(tokenizer, prompt, call_ids + result_ids)
    sampling = SamplingParams(max_tokens=len(call_ids) + 8, temperature=0)
    [sequence] = generate(model, tokenizer, [prompt], sampling, run_tool=lambda call: result)
    assert [message["role"] for message in sequence.messages] == ["assistant", "tool"]
    assert sequence.finish_reason == "length"


def test_a_call_that_ends_with_the_last_token_is_not_run(tokenizer):
    prompt, call_ids, result_ids = call_and_result_ids(tokenizer, "2")
    model = ScriptedModel(tokenizer, prompt, call_ids + result_ids + tokenizer.encode("It is 2."))
    sampling = SamplingParams(max_tokens=len(call_ids), temperature=0)
    [sequence] = generate(model, tokenizer, [prompt], sampling, run_tool=run_tool)
    assert sum(sequence.sampled_mask) == len(call_ids)
    assert len(sequence.completion_ids) == len(call_ids)


# -- cancelling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1], ids=["waiting", "prompt half computed"])
def test_cancelling_the_first_sample_does_not_stop_its_siblings(tokenizer, steps):
    """The first sample computes the prompt for all of them; another one must take over."""
    model = toy_model("ghost", tokenizer)
    prompt = tokenizer.encode("The king sees the queen. The sea")
    sampling = SamplingParams(max_tokens=5, temperature=1.0, seed=2)
    expected = [sequence.completion_ids for sequence in generate(model, tokenizer, [prompt], sampling, samples=4)]
    engine = Engine(TorchRunner(model, 4, 64), tokenizer)
    engine.runner.token_budget = 6
    sequences = engine.add(prompt, sampling, samples=4)
    for _ in range(steps):
        engine.step()
    engine.cancel(sequences[2])
    engine.cancel(sequences[0])
    while engine.has_unfinished:
        engine.step()
    assert [sequence.completion_ids for sequence in sequences] == [[], expected[1], [], expected[3]]


class OpensACall(ScriptedModel):
    """Writes <tool_call>, and then whatever random logits prefer."""

    def forward(self, tokens, cache, last_B):
        position = int(cache.next_index_B[0] + last_B[0]) + 1 - self.prompt_len
        if position < len(self.script):
            return super().forward(tokens, cache, last_B)
        generator = torch.Generator().manual_seed(position)
        return torch.randn(len(tokens), 1, self.config.vocab_size, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_a_call_is_well_formed_whatever_the_model_prefers(tokenizer, seed):
    """In RL nothing is forbidden, so that the log-probabilities are the model's."""
    prompt = render([{"role": "user", "content": "?"}], tokenizer, add_generation_prompt=True)[0]
    start, end = tokenizer.special_id("<tool_call>"), tokenizer.special_id("</tool_call>")
    model = OpensACall(tokenizer, prompt, [start])
    sampling = SamplingParams(max_tokens=400, temperature=1.0, seed=seed)
    [sequence] = generate(model, tokenizer, [prompt], sampling)
    text = tokenizer.decode(sequence.completion_ids[1:])
    assert text.startswith('\n{"name": "')
    if end in sequence.completion_ids:
        call = json.loads(tokenizer.decode(sequence.completion_ids[1 : sequence.completion_ids.index(end)]))
        assert list(call) == ["name", "arguments"]
    [free] = generate(model, tokenizer, [prompt], replace(sampling, constrain_calls=False))
    assert not tokenizer.decode(free.completion_ids[1:]).startswith('\n{"name": "')
