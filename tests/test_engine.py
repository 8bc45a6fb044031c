"""The engine with packed weights: kernels against plain PyTorch, and that nobody notices who else is being served."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nanoghost.engine import kernels
from nanoghost.engine.engine import Engine
from nanoghost.engine.generate import generate
from nanoghost.engine.block_manager import BLOCK_SIZE
from nanoghost.engine.paged_runner import PagedRunner
from nanoghost.engine.quantization import LANES, dequantize, quantize
from nanoghost.engine.quantized_llama import EMPTY, load_quantized, quantize_model
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_folder import save_model
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import Adapter, new_adapter
from nanoghost.model.rope import rope_table
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

# ── packing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bits, error", [(4, 1 / 15), (8, 1 / 127), (16, 2**-7)])
def test_what_is_packed_is_near_and_packing_again_changes_nothing(bits, error):
    torch.manual_seed(bits)
    weight = torch.randn(50, 96)  # 50 outputs do not fill the last block
    weight[3, 32:64] = 0.25  # a group of equal weights, and one of zeros
    weight[4, :32] = 0.0
    packed = quantize(weight, bits)
    numbers = dequantize(packed)
    groups = weight.view(50, 3, 32)
    reach = groups.amax(2) - groups.amin(2) if bits == 4 else groups.abs().amax(2)
    assert (
        (numbers - weight).view(50, 3, 32).abs().amax(2) <= 0.51 * error * reach + 1e-3 * groups.abs().amax(2)
    ).all()
    assert torch.equal(dequantize(quantize(numbers, bits)), numbers)
    rows = torch.tensor([49, 0, 17])
    assert torch.equal(dequantize(packed, rows), numbers[rows])


needs_kernels = pytest.mark.skipif(bool(kernels.unavailable_reason()), reason=f"no kernels here: {kernels.unavailable_reason()}")


def rounded(x_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """Inputs as the kernel sees them: bf16, or 8 bits in groups of 32."""
    if bits == 16:
        return x_NK.bfloat16().float()
    groups = x_NK.view(len(x_NK), -1, 32)
    most = groups.abs().amax(-1, keepdim=True)
    return ((groups * (127 / most.clamp_min(1e-30))).round() * (most / 127)).view_as(x_NK)


def test_the_best_instructions_that_a_processor_has():
    avx512, avx2 = kernels.INSTRUCTION_SETS
    assert kernels.best(dict.fromkeys(avx512 + avx2, True)) == avx512
    assert kernels.best(dict.fromkeys(avx512 + avx2, True) | {"avx512_bf16": False}) == avx2
    assert kernels.best({"neon": True, "avx2": False}) == ()


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("N", [1, 3, 7, 16, 37])
def test_products_are_those_of_the_numbers(bits, N):
    torch.manual_seed(N)
    weight, bias, norm = torch.randn(50, 96), torch.randn(50), torch.rand(96) + 0.5
    x, start = torch.randn(N, 96), torch.randn(N, 50)
    x[0, :32] = 0.0
    p = quantize(weight, bits)
    numbers = dequantize(p)

    def product(x, bias=EMPTY, norm=EMPTY, out=None):
        add, out = out is not None, torch.full((len(x), 50), torch.nan) if out is None else out.clone()
        torch.ops.nanoghost.linear(x, p.codes, p.scales, p.mins, bits, bias, norm, 1e-5, out, add)
        return out

    def close(a, b):
        assert (a - b).norm() <= 1e-3 * b.norm()  # a rounding that falls the other way is a step of 1/127

    close(product(x), rounded(x, bits) @ numbers.T)
    close(product(x, bias, out=start), rounded(x, bits) @ numbers.T + bias + start)
    close(product(x, norm=norm), rounded(F.rms_norm(x, (96,), norm, 1e-5), bits) @ numbers.T)
    gate = torch.randn(N, 96) * 3
    close(product(torch.cat([gate, x], 1)), rounded(F.silu(gate) * x, bits) @ numbers.T)
    for n in range(N):
        assert torch.equal(product(x[n : n + 1])[0], product(x)[n]), "a row does not notice the others"


@needs_kernels
@pytest.mark.parametrize("H, J, D, window", [(9, 3, 64, 0), (4, 2, 64, 20), (2, 2, 128, 0), (4, 1, 128, 5)])
def test_attention_over_pages(H, J, D, window):
    torch.manual_seed(H)
    T = 45
    cos, sin = rope_table(64, D, 10000.0, None)
    q_norm, k_norm = torch.rand(D) + 0.5, torch.rand(D) + 0.5
    qkv = torch.randn(2, T, (H + 2 * J) * D)
    cache = torch.full(
        (12, J, 2, LANES * D), torch.nan, dtype=torch.float16
    )  # whoever reads what nobody wrote is found out
    table = torch.tensor([[7, 2, 9, 0], [3, 11, 5, 0]], dtype=torch.int32)

    def attend(row, start, end):
        own = qkv[row, start:end].clone()
        rows, at = torch.full((end - start,), row), torch.arange(start, end)
        return torch.ops.nanoghost.attend(
            own, cos, sin, cache, table, rows.int(), at.int(), D**-0.5, window, q_norm, k_norm, 1e-5
        )  # fmt: skip

    for row, pieces in ((0, [(0, 45)]), (1, [(0, 17), (17, 40), *((t, t + 1) for t in range(40, 45))])):
        got = torch.cat([attend(row, *piece) for piece in pieces])
        q, k, v = qkv[row].view(T, -1, D).split([H, J, J], 1)

        def turned(x, weight):
            a, b = F.rms_norm(x, (D,), weight, 1e-5).chunk(2, -1)
            c, s = cos[:T, None], sin[:T, None]
            return torch.cat([a * c - b * s, b * c + a * s], -1)

        q, k, v = turned(q, q_norm), turned(k, k_norm).half().float(), v.half().float()
        at = torch.arange(T)
        seen = (at[:, None] >= at) & ((at[:, None] - at < window) if window else True)
        k, v = (z.repeat_interleave(H // J, 1).transpose(0, 1) for z in (k, v))
        want = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, seen).transpose(0, 1).flatten(1)
        assert_close(got, want, rtol=1e-3, atol=1e-4)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


def llama(tokenizer, **changes):
    torch.manual_seed(0)
    settings = {"depth": 2, "width": 64, "heads": 2, "key_value_heads": 1, "head_width": 64, "mlp_width": 96} | changes
    model = Llama(LlamaConfig(tokenizer.vocab_size, 256, **settings))
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)  # what starts at zero would make the test blind
    return model


def whole_text(packed, ids, adapted=()):
    """Logits (T, V) of a text read in one pass, in a cache of its own."""
    n = len(ids)
    pages = packed.new_kv_cache(-(-n // BLOCK_SIZE))
    table = torch.arange(pages.size(1), dtype=torch.int32)[None]
    rows, at = torch.zeros(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32)
    return packed.forward(torch.tensor(ids), rows, at, pages, table, torch.arange(n), adapted)


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_embeddings": True},
        {"qkv_bias": True, "out_bias": True, "qk_norm": True},
        {"sliding_windows": (9, 0)},
        {"no_rope_layers": (1,)},
    ],
    ids=lambda c: ",".join(c) or "plain",
)
def test_a_packed_llama_is_that_llama(changes, tokenizer):
    model = llama(tokenizer, **changes)
    ids = tokenizer.encode(toy_text(3))[:60]
    for bits, error in ((16, 0.04), (8, 0.1)):  # rounded inputs, too; weights this wild carry errors on
        packed = quantize_model(model, bits)
        with torch.no_grad():
            want = model(torch.tensor([ids]))[0]
        got = whole_text(packed, ids)
        assert (got - want).norm() < error * want.norm()
        one_by_one = whole_text(packed, ids, [(slice(0, 20), Adapter(1, 1.0, {}))])
        assert torch.equal(got, one_by_one), "all layers in one call are the same as each operator alone"


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_kept_beside_the_weights_and_made_anew_with_them(tokenizer, tmp_path, tied):
    save_model(tmp_path, llama(tokenizer, tied_embeddings=tied), tokenizer)
    first, kept = load_quantized(tmp_path), tmp_path / "quantized.safetensors"
    made = kept.stat().st_mtime_ns
    again = load_quantized(tmp_path)
    assert kept.stat().st_mtime_ns == made
    ids = list(range(20))
    assert torch.equal(whole_text(first, ids), whole_text(again, ids))
    (tmp_path / "model.safetensors").touch()
    load_quantized(tmp_path)
    assert kept.stat().st_mtime_ns != made


@needs_kernels
def test_as_few_bits_as_lose_nothing(tokenizer, tmp_path):
    """A model that was rounded to 4 bits is recognised and read without loss; any other gets 8."""
    model = llama(tokenizer)
    with torch.no_grad():
        for p in model.matrices():
            p.copy_(dequantize(quantize(p, 4)))
    save_model(tmp_path, model, tokenizer)
    parts = load_quantized(tmp_path).weights
    assert {p.bits for name, p in parts.items() if name.startswith("blocks.") and hasattr(p, "bits")} == {4}
    assert parts["embedding"].bits == parts["head"].bits == 8
    assert_close(dequantize(parts["blocks.1.down"]), model.blocks[1].matrix("down").detach(), rtol=1e-5, atol=1e-7)


@needs_kernels
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guessing_ahead_changes_nothing(tokenizer, temperature):
    model = llama(tokenizer)
    for block in model.blocks:  # what follows a token depends almost on it alone, so texts soon go in circles
        block.matrix("out").data *= 0.02
    model = quantize_model(model, 8)
    prompts = [tokenizer.encode("the king the queen the king the queen the king the"), tokenizer.encode("A")]
    s = SamplingParams(max_tokens=150, temperature=temperature, seed=4)

    def written(drafts):
        runner = PagedRunner(model, 1000)
        runner.speculative = drafts
        steps, run = [], runner.run
        runner.run = lambda batch: steps.append(len(batch)) or run(batch)
        return [row.completion_ids for row in generate(runner, tokenizer, prompts, s, samples=2)], len(steps)

    (plain, many), (guessed, few) = written(False), written(True)
    assert plain == guessed and few <= many
    assert temperature or few < many


@needs_kernels
def test_nobody_notices_who_else_is_served(tokenizer):
    """Rows come and go at random, share beginnings, are cancelled, and find too little room; each writes as if alone."""
    model = quantize_model(llama(tokenizer), 8)
    rng = random.Random(0)
    words = tokenizer.encode(toy_text(20))
    beginnings = [words[i * 40 : i * 40 + n] for i, n in enumerate((0, 16, 33, 64))]
    asked = []
    for i in range(40):
        prompt = rng.choice(beginnings) + rng.sample(words, rng.randint(1, 30))
        s = SamplingParams(
            rng.randint(1, 40), rng.choice([0.0, 0.7, 1.0]), rng.choice([0, 5]), rng.choice([1.0, 0.9]), seed=i
        )
        asked.append((prompt, s, rng.choice([1, 1, 3])))
    alone = []
    for prompt, s, samples in asked:
        alone.append([row.completion_ids for row in generate(PagedRunner(model, 2000), tokenizer, [prompt], s, samples)])

    engine = Engine(PagedRunner(model, 600, slots=7), tokenizer)
    rows, coming = [], list(asked)
    engine.runner.token_budget = 48  # prompts are read in pieces, beside those who write
    while coming or engine.has_unfinished:
        while coming and rng.random() < 0.5:
            rows.append(engine.add(coming[0][0], coming[0][1], coming[0][2]))
            coming.pop(0)
        if rng.random() < 0.1 and engine.scheduler.running:
            engine.cancel(rng.choice(engine.scheduler.running))
        if rng.random() < 0.05 and engine.scheduler.waiting:
            engine.cancel(engine.scheduler.waiting[-1])
        if engine.has_unfinished:
            engine.step()
    finished = 0
    for group, want in zip(rows, alone):
        for row, ids in zip(group, want):
            finished += row.finish_reason != "cancelled"
            assert row.completion_ids == (ids[: len(row.completion_ids)] if row.finish_reason == "cancelled" else ids)
    assert finished > 25 and not any(engine.runner.block_manager.ref_count) and len(engine.runner.block_manager.free_blocks) == len(engine.runner.block_manager.ref_count)


@needs_kernels
def test_a_beginning_is_read_once(tokenizer):
    model = quantize_model(llama(tokenizer), 8)
    runner = PagedRunner(model, 1000)
    read, run = [], runner.run
    runner.run = lambda batch: read.extend(len(r.token_ids) - r.num_draft for r in batch) or run(batch)
    first = tokenizer.encode(toy_text(6))[:100]
    s = SamplingParams(max_tokens=20, temperature=0)
    [row] = generate(runner, tokenizer, [first], s)
    read.clear()
    turn = row.token_ids + first[:5]
    generate(runner, tokenizer, [turn], s)
    assert read[0] <= BLOCK_SIZE + 5 + 1
    read.clear()
    engine = Engine(runner, tokenizer)
    model.adapters["another"] = Adapter(4, 32.0, {})
    engine.add(turn, s, adapter="another")
    engine.step()
    assert read[0] == len(turn), "another adapter's keys and values are other ones"


@needs_kernels
def test_attempts_at_one_prompt_read_it_once(tokenizer):
    runner = PagedRunner(quantize_model(llama(tokenizer), 16), 2000)
    read, run = [], runner.run
    runner.run = lambda batch: read.append(sum(len(r.token_ids) - r.num_draft for r in batch)) or run(batch)
    prompt = tokenizer.encode(toy_text(6))[:53]
    rows = generate(runner, tokenizer, [prompt], SamplingParams(max_tokens=4, temperature=1.0), samples=8)
    assert read[0] == 53 and all(n <= 8 for n in read[1:]) and len({tuple(row.completion_ids) for row in rows}) > 1


@needs_kernels
def test_each_row_goes_through_the_adapter_it_asks_for(tokenizer):
    """Two adapters and none side by side write what the merged models and the base write alone."""
    base = llama(tokenizer)
    adapters = {}
    for i, targets in enumerate((None, "q,down")):
        adapter = new_adapter(base, 4, None, targets, seed=i)
        for _, b, _ in adapter.updates.values():
            b.data = 0.05 * torch.randn(b.shape, generator=torch.Generator().manual_seed(i))
        adapters[f"toy@{i}"] = adapter
    model = quantize_model(base, 16)
    model.adapters = adapters
    prompt = tokenizer.encode(toy_text(4))[:50]
    with torch.inference_mode():
        want = {}
        for name, adapter in {"": None, **adapters}.items():
            base.adapters = [adapter] if adapter else []
            want[name] = whole_text(quantize_model(base, 16), prompt)[-1]
        runner = PagedRunner(model, 1000)
        engine = Engine(runner, tokenizer)
        runner.speculative = False
        names = ["toy@1", "", "toy@0", "toy@0"]
        seen, run = [], runner.run
        runner.run = lambda batch: seen.append(run(batch)) or seen[-1]
        for name in names:
            engine.add(prompt, SamplingParams(max_tokens=2, temperature=0), adapter=name)
        engine.step()
    for name, logits in zip(names, seen[0]):
        assert (logits - want[name]).norm() < 0.04 * want[name].norm()
    assert (want["toy@0"] - want[""]).norm() > 0.2 * want[""].norm() < 5 * (want["toy@1"] - want[""]).norm()
