"""The engine with quantized weights and a paged KV cache: its contract, prefix caching, drafts, samples, adapters."""

import random
from dataclasses import dataclass

import pytest
import torch

from nanoghost.engine import kernels
from nanoghost.engine.block_manager import BLOCK_SIZE
from nanoghost.engine.engine import Engine
from nanoghost.engine.generate import generate
from nanoghost.engine.paged_runner import PagedRunner
from nanoghost.engine.quantized_llama import quantize_model
from nanoghost.engine.sampler import SamplingParams
from nanoghost.model.lora import Adapter, new_adapter
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.engine_toys import RecordingRunner, toy_llama
from tests.support.toys import toy_text

NO_KERNELS = kernels.unavailable_reason()
pytestmark = pytest.mark.skipif(bool(NO_KERNELS), reason=f"no kernels here: {NO_KERNELS}")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


# -- the contract: tokens depend only on prompt, settings and seed ----------------------------------------------------


@dataclass
class Request:
    prompt: list[int]
    sampling: SamplingParams
    samples: int


def random_requests(tokenizer, rng: random.Random) -> list[Request]:
    """Requests with common prefixes of 0 to 64 tokens and all kinds of settings."""
    words = tokenizer.encode(toy_text(20))
    prefixes = [words[i * 40 : i * 40 + n] for i, n in enumerate((0, 16, 33, 64))]
    requests = []
    for seed in range(40):
        prompt = rng.choice(prefixes) + rng.sample(words, rng.randint(1, 30))
        max_tokens, temperature = rng.randint(1, 40), rng.choice([0.0, 0.7, 1.0])
        top_k, top_p = rng.choice([0, 5]), rng.choice([1.0, 0.9])
        sampling = SamplingParams(max_tokens, temperature, top_k, top_p, seed)
        requests.append(Request(prompt, sampling, rng.choice([1, 1, 3])))
    return requests


def serve_randomly(engine: Engine, requests: list[Request], rng: random.Random) -> list[list]:
    """Add requests at random moments, and cancel some sequences; returns the sequences of each request."""
    scheduler = engine.scheduler
    requests, groups = list(requests), []
    while requests or engine.has_unfinished:
        while requests and rng.random() < 0.5:
            request = requests.pop(0)
            groups.append(engine.add(request.prompt, request.sampling, request.samples))
        if rng.random() < 0.1 and scheduler.running:
            engine.cancel(rng.choice(scheduler.running))
        if rng.random() < 0.05 and scheduler.waiting:
            engine.cancel(scheduler.waiting[-1])
        if engine.has_unfinished:
            engine.step()
    return groups


def test_tokens_do_not_depend_on_the_other_sequences(tokenizer):
    """Sequences join and leave at random, share prefixes, are cancelled, and wait for memory.

    Prompts are computed in chunks next to decoding sequences. Each sequence gets the tokens that it gets alone.
    """
    model = quantize_model(toy_llama(tokenizer), 8)
    rng = random.Random(0)
    requests = random_requests(tokenizer, rng)
    expected = []
    for request in requests:
        runner = PagedRunner(model, 2000)
        alone = generate(runner, tokenizer, [request.prompt], request.sampling, request.samples)
        expected.append([sequence.completion_ids for sequence in alone])

    engine = Engine(PagedRunner(model, 600, slots=7), tokenizer)
    engine.runner.token_budget = 48
    num_finished = 0
    for group, group_expected in zip(serve_randomly(engine, requests, rng), expected):
        for sequence, ids in zip(group, group_expected):
            if sequence.finish_reason == "cancelled":
                ids = ids[: len(sequence.completion_ids)]
            else:
                num_finished += 1
            assert sequence.completion_ids == ids
    assert num_finished > 25
    manager = engine.runner.block_manager
    assert not any(manager.ref_count)
    assert len(manager.free_blocks) == len(manager.ref_count)


# -- prefix caching ---------------------------------------------------------------------------------------------------


def test_a_cached_prefix_is_not_computed_again(tokenizer):
    """The next turn of a conversation computes only what is new, and the last block that was not full."""
    runner = RecordingRunner(PagedRunner(quantize_model(toy_llama(tokenizer), 8), 1000))
    prompt = tokenizer.encode(toy_text(6))[:100]
    sampling = SamplingParams(max_tokens=20, temperature=0)
    [sequence] = generate(runner, tokenizer, [prompt], sampling)
    runner.num_tokens.clear()
    next_turn = sequence.token_ids + prompt[:5]
    generate(runner, tokenizer, [next_turn], sampling)
    assert runner.num_tokens[0][0] <= BLOCK_SIZE + 5 + 1


def test_adapters_do_not_share_prefixes(tokenizer):
    """Keys and values depend on the adapter."""
    model = quantize_model(toy_llama(tokenizer), 8)
    runner = RecordingRunner(PagedRunner(model, 1000))
    prompt = tokenizer.encode(toy_text(6))[:100]
    sampling = SamplingParams(max_tokens=20, temperature=0)
    generate(runner, tokenizer, [prompt], sampling)
    runner.num_tokens.clear()
    model.adapters["another"] = Adapter(4, 32.0, {})
    engine = Engine(runner, tokenizer)
    engine.add(prompt, sampling, adapter="another")
    engine.step()
    assert runner.num_tokens[0] == [len(prompt)]


def test_samples_of_a_prompt_compute_it_once(tokenizer):
    runner = RecordingRunner(PagedRunner(quantize_model(toy_llama(tokenizer), 16), 2000))
    prompt = tokenizer.encode(toy_text(6))[:53]
    sampling = SamplingParams(max_tokens=4, temperature=1.0)
    sequences = generate(runner, tokenizer, [prompt], sampling, samples=8)
    assert sum(runner.num_tokens[0]) == 53
    assert all(sum(step) <= 8 for step in runner.num_tokens[1:])
    assert len({tuple(sequence.completion_ids) for sequence in sequences}) > 1


# -- speculative decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_the_number_of_steps_and_not_the_tokens(tokenizer, temperature):
    model = toy_llama(tokenizer)
    for block in model.blocks:  # the next token depends almost only on the last one, so the text soon repeats itself
        block.matrix("out").data *= 0.02
    model = quantize_model(model, 8)
    prompts = [tokenizer.encode("the king the queen the king the queen the king the"), tokenizer.encode("A")]
    sampling = SamplingParams(max_tokens=150, temperature=temperature, seed=4)
    completions, num_steps = {}, {}
    for speculative in (False, True):
        runner = RecordingRunner(PagedRunner(model, 1000))
        runner.speculative = speculative
        sequences = generate(runner, tokenizer, prompts, sampling, samples=2)
        completions[speculative] = [sequence.completion_ids for sequence in sequences]
        num_steps[speculative] = len(runner.num_tokens)
    assert completions[True] == completions[False]
    assert num_steps[True] <= num_steps[False]
    if temperature == 0:
        assert num_steps[True] < num_steps[False]


# -- adapters ---------------------------------------------------------------------------------------------------------


def toy_adapters(base) -> dict[str, Adapter]:
    """One adapter of all matrices and one of two."""
    adapters = {}
    for i, targets in enumerate((None, "q,down")):
        adapter = new_adapter(base, 4, None, targets, seed=i)
        for _, b_NR, _ in adapter.updates.values():
            b_NR.data = 0.05 * torch.randn(b_NR.shape, generator=torch.Generator().manual_seed(i))
        adapters[f"toy@{i}"] = adapter
    return adapters


@torch.inference_mode()
def test_each_sequence_of_a_batch_uses_its_adapter(tokenizer):
    """Two adapters and the base model in one batch give the logits of models into which the adapters are merged."""
    base = toy_llama(tokenizer)
    adapters = toy_adapters(base)
    model = quantize_model(base, 16)
    model.adapters = adapters
    prompt = tokenizer.encode(toy_text(4))[:50]
    expected = {}
    for name in ("", *adapters):
        base.adapters = [adapters[name]] if name else []
        merged = quantize_model(base, 16)
        expected[name] = merged.forward_one(prompt, 0, merged.new_kv_cache(4))[-1]

    runner = RecordingRunner(PagedRunner(model, 1000))
    runner.speculative = False
    engine = Engine(runner, tokenizer)
    names = ["toy@1", "", "toy@0", "toy@0"]
    for name in names:
        engine.add(prompt, SamplingParams(max_tokens=2, temperature=0), adapter=name)
    engine.step()
    for name, logits in zip(names, runner.logits[0]):
        assert (logits - expected[name]).norm() < 0.04 * expected[name].norm()
    base_norm = expected[""].norm()  # the adapters matter:
    assert (expected["toy@0"] - expected[""]).norm() > 0.2 * base_norm
    assert base_norm < 5 * (expected["toy@1"] - expected[""]).norm()
