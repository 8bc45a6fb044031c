"""Both architectures at toy size: what a logit may depend on, caches against recomputing, counts, folders on disk."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.model.character_features import (
    CHARACTERS,
    END_OF_WORD,
    MAX_TOKEN_BYTES,
    NO_FEATURE,
    POSITIONS,
    POSITIONS_PER_END,
    byte_class,
    character_table,
    single_character_tokens,
    word_features,
)
from nanoghost.model.copy_heads import POINTER_WIDTH
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

V = 300
GHOST = GhostConfig(vocab_size=V, context=24, depth=3, width=32, head_width=16, bigram_rows=101)
LLAMA = LlamaConfig(vocab_size=V, context=24, depth=3, width=32, heads=4, key_value_heads=2, mlp_width=48)
CONFIGS = {"ghost": GHOST, "llama": LLAMA, "tied llama": replace(LLAMA, tied_embeddings=True)}


def fresh(config):
    torch.manual_seed(0)
    return (Ghost if isinstance(config, GhostConfig) else Llama)(config)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def model(config):
    """As if trained: what starts at zero or one is random, so that everything that can reach the logits does."""
    model = fresh(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.unique().numel() <= 3:  # zeros, ones, the two numbers of a residual mix, the gates' biases
                p.add_(torch.randn_like(p) * 0.3)
        model.head_weight.mul_(0.5 / model.head_weight.std())
    if isinstance(model, Ghost):
        model.character_table[:, 0] = torch.randint(1, 5, (V,))
        model.character_table[:, 1:3] = torch.randint(3, (V, 2))
        model.character_table[:, 3:] = torch.randint(256, (V, MAX_TOKEN_BYTES))
        model.character_tokens.copy_(single_character_tokens(model.character_table))
    return model.requires_grad_(False)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(rows * 100 + length))


# ── what a logit may depend on ──────────────────────────────────────────────────────────────────────────────────────


def test_every_position_sees_the_past_and_none_the_future(model):
    """One token is changed: the logits before it stay as they were, those from it on all change."""
    x_BT = tokens(1, 12)
    before = model(x_BT)
    for t in (0, 5, 11):
        other = x_BT.clone()
        other[0, t] = (other[0, t] + 1) % V
        after = model(other)
        assert_close(after[:, :t], before[:, :t], rtol=0, atol=0)
        assert ((after - before)[0, t:].abs().amax(-1) > 1e-4).all()


def test_packed_conversations_are_as_if_alone(model):
    """Nothing passes from one to the next: neither attention nor, in a Ghost, the pair of neighbouring tokens."""
    first, second, third = tokens(1, 5), tokens(1, 8), tokens(1, 1)
    row = torch.cat([first, second, third], 1)
    segments = torch.tensor([[1] * 5 + [2] * 8 + [3]])
    packed = model(row, segments_BT=segments)
    for alone, part in zip((first, second, third), packed.split([5, 8, 1], 1)):
        assert_close(part, model(alone), rtol=1e-4, atol=1e-5)
    other_first = (first + 1) % V
    again = model(torch.cat([other_first, second, third], 1), segments_BT=segments)
    assert_close(again[:, 5:], packed[:, 5:], rtol=0, atol=0)
    assert (model(row)[:, 5:] - packed[:, 5:]).abs().max() > 1e-3, "without segments there is something to leak"


def test_logprobs_are_the_log_softmax_of_the_logits(model):
    x_BT, targets_BT = tokens(2, 9), tokens(2, 10)[:, 1:]
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    slow = model(x_BT, segments_BT=segments).log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    assert_close(model.logprobs(x_BT, targets_BT, segments), slow, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert_close(model.logprobs(x_BT, targets_BT, segments), slow, rtol=1e-4, atol=1e-4)


def test_a_pointer_copies_from_what_it_may_see_and_nothing_else():
    """With the gate wide open all probability lies on tokens that were read, of this conversation alone."""
    model = fresh(GHOST).requires_grad_(False)
    model.copy_heads.gates.bias[0] = 50.0
    row = torch.tensor([[5, 6, 7, 20, 21, 22]])
    probs = model(row, segments_BT=torch.tensor([[1, 1, 1, 2, 2, 2]])).exp()
    for t in range(6):
        seen = row[0, 3 * (t // 3) : t + 1]
        assert_close(probs[0, t, seen].sum(), torch.tensor(1.0), rtol=1e-4, atol=0)
    names = torch.tensor([[9, 30, 10, 11, 9]])  # after the second 9 stands what followed the first
    alike = model(names).exp()[0, -1]
    assert alike[30] > 2 * alike[[10, 11]].max()


def test_a_letter_comes_from_a_word_that_was_read():
    """With that gate wide open too, all probability is on letters of what may be seen; place 1 is the second letter."""
    tokenizer = Tokenizer.train([toy_text()], V)
    model = fresh(GHOST)
    model.requires_grad_(False).set_character_features(tokenizer)
    model.copy_heads.gates.bias[1], model.copy_heads.gates.bias[2 + 1] = 50.0, 50.0
    ids = tokenizer.encode("o king")
    for text, letters in (("king", "i"), (" king", "i"), ("ki-ng", "i"), ("on, king", "ni")):
        probs = model(torch.tensor([tokenizer.encode(text)])).exp()[0, -1]
        assert_close(probs[[tokenizer.encode(c)[0] for c in letters]].sum(), torch.tensor(1.0), rtol=1e-3, atol=0)
    assert model(torch.tensor([ids])).exp()[0, 0].max() < 0.5, "a word of one letter has no second one"


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 4, 3], [11, 1], [12]], ids=str)
def test_the_cache_equals_recomputing(model, chunks):
    x_BT = tokens(3, 12)
    cache = model.new_cache(3, 20)
    logits = torch.cat([model(x, cache) for x in x_BT.split(chunks, 1)], 1)
    assert_close(logits, model(x_BT), rtol=1e-4, atol=1e-5)
    assert cache.next_slots_B.tolist() == [12] * 3


def test_only_those_logits_that_are_wanted(model):
    x_BT, last_B = tokens(2, 7), torch.tensor([6, 3])
    wanted = model(x_BT)[[0, 1], last_B, None]
    assert_close(model(x_BT, last_B=last_B), wanted, rtol=1e-4, atol=1e-5)
    assert_close(model(x_BT, model.new_cache(2, 7), last_B=last_B), wanted, rtol=1e-4, atol=1e-5)


def test_conversations_of_different_lengths_are_as_if_alone(model):
    """Prompts padded on the right, then steps together in which now one and now the other waits; a row is copied."""
    lengths, new, capacity = (7, 2, 4), 4, 11  # the longest fills the cache to its last column
    rows = [tokens(1, n + new) for n in lengths]
    padded = torch.full((3, 7), 17)  # what the padding is must not matter, so it is an ordinary token
    for i, (row, n) in enumerate(zip(rows, lengths)):
        padded[i, :n] = row[0, :n]
    cache = model.new_cache(4, capacity)
    cache.select([2, 0, 3], torch.zeros(3, dtype=torch.long))  # seats in any order
    steps = [model(padded, cache, last_B=torch.tensor(lengths) - 1)[:, 0]]
    cache.copy_rows([2, 0, 3], [0, 1, 2], 7)
    for t in range(new - 1):
        cache.select(None, torch.tensor(lengths) + t)
        steps.append(model(torch.cat([row[:, n + t : n + t + 1] for row, n in zip(rows, lengths)]), cache)[:, 0])
    together = torch.stack(steps, 1)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        assert_close(together[i], model(row)[0, n - 1 : n + new - 1], rtol=1e-4, atol=1e-5)

    cache.select([1], torch.tensor([5]))  # one reads two more, the others stand
    assert_close(model(rows[1][:, -1:], cache)[0, 0], model(rows[1])[0, -1], rtol=1e-4, atol=1e-5)
    cache.select([1, 0], torch.tensor([0, 9]))  # a row begins anew while another pads beyond the end
    both = model(torch.cat([rows[1][:, :5], rows[0][:, [9, 10, 0, 0, 0]]]), cache)
    assert_close(both[0], model(rows[1])[0, :5], rtol=1e-4, atol=1e-5)
    assert_close(both[1, :2], model(rows[0])[0, 9:], rtol=1e-4, atol=1e-5)


# ── the start, and counts ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_model_is_undecided(config, dtype):
    model = fresh(config).cast(dtype)
    x_BT = tokens(4, 24)
    loss = -model.logprobs(x_BT, x_BT.roll(-1, 1)).mean()
    assert abs(loss.item() - math.log(V)) < 0.05
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def independent_count(config) -> dict[str, int]:
    """Parameters by kind, from the architecture as the docstrings tell it."""
    c, D = config, config.width
    if isinstance(c, GhostConfig):
        valued = math.ceil(c.depth / 2)  # every second layer, the last included
        return {
            "matrices": c.depth * (3 + 1 + 4 + 4) * D * D + 4 * POINTER_WIDTH * D,
            "head": V * D,
            "embeddings": V * D * (1 + valued) + (NO_FEATURE + 1) * D,
            "bigram_embedding": c.bigram_rows * D,
            "scalars": 2 * c.depth + valued + (2 + POSITIONS) * (1 + D),
        }
    attention = 2 * D * D + 2 * D * D * c.key_value_heads // c.heads
    embeddings = 0 if c.tied_embeddings else V * D
    return {
        "matrices": c.depth * (attention + 3 * D * c.mlp_width),
        "head": V * D,
        "embeddings": embeddings,
        "scalars": (2 * c.depth + 1) * D,
    }


def test_parameter_counts(config):
    model = fresh(config)
    assert model.parameter_counts() == independent_count(config)
    grouped = [id(p) for ps in model.parameter_groups().values() for p in ps]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()), "each parameter is in one group, once"


def test_flops_are_what_pytorch_counts(config):
    """Of the matrix products of a training step; of a T x T attention only the half that is not masked is useful."""
    B, T = 2, 16
    model = fresh(config)
    with FlopCounterMode(display=False) as counter:
        (-model.logprobs(tokens(B, T), tokens(B, T)).mean()).backward()
    flops = {operation.__name__.split(".")[0]: n for operation, n in counter.get_flop_counts()["Global"].items()}
    attention = flops.pop("bmm") + flops.pop("baddbmm")
    assert model.flops_per_token(T) * B * T == sum(flops.values()) + attention // 2
    assert model.flops_per_token() == model.flops_per_token(config.context)


def test_a_model_without_memory_can_be_counted(config):
    """On PyTorch's meta device: how large a model would be, without making it."""
    large = replace(config, vocab_size=10**6)
    with torch.device("meta"):
        model = (Ghost if isinstance(config, GhostConfig) else Llama)(large)
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.parameter_counts()["head"] == 10**6 * config.width


# ── on disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(200)], V)


def test_of_a_text_that_is_read_again_the_tables_meet_each_line_about_once():
    model, tokens = fresh(GHOST).requires_grad_(False), torch.randint(V, (4, 24))
    model.bigram_embedding.weight.normal_()
    whole, found = model.look_up(model.bigram_embedding, "bigram", tokens % 101), []
    for seed in range(2000):
        model.set_embedding_row_dropout(4.0, seed)
        found.append(model.look_up(model.bigram_embedding, "bigram", tokens % 101) / whole)
    found = torch.stack(found)
    assert set(found.round().unique().tolist()) == {0.0, 4.0}, (
        "left out, or scaled up by as much as others are left out"
    )
    assert_close(found.mean(0), torch.ones_like(whole), atol=0.25, rtol=0)
    thinned = model.logprobs(tokens[:, :-1], tokens[:, 1:])
    model.set_embedding_row_dropout(4.0, 1999)
    assert torch.equal(model.logprobs(tokens[:, :-1], tokens[:, 1:]), thinned), "the same seed leaves out the same rows"
    with torch.no_grad():
        tested = model.logprobs(tokens[:, :-1], tokens[:, 1:])
        model.set_embedding_row_dropout(1.0, 0)
        assert torch.equal(model.logprobs(tokens[:, :-1], tokens[:, 1:]), tested), (
            "who does not learn looks everything up"
        )
    assert not torch.equal(tested, thinned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_is_loaded_bit_for_bit(model, tokenizer, tmp_path, dtype):
    model.cast(dtype)
    save_model(tmp_path, model, tokenizer)
    loaded, loaded_tokenizer = load_model(tmp_path, dtype)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(2, 20)), model(tokens(2, 20)))
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert loaded_tokenizer.encode("The king sees.") == tokenizer.encode("The king sees.")


def test_a_token_knows_the_letters_of_its_word_so_far(tokenizer):
    """Against reading the bytes one token after the other; what is cut into many tokens is known as well as what is one."""
    table = character_table(tokenizer)
    text = "The unkind owl\nsaid t-o o-w-l: 1066, 30+4 naïve owls' heads; wards sdraw  xyzzyx."
    ids = tokenizer.encode(text)
    before = torch.arange(len(ids))[None] - 1
    rows = word_features(table, torch.tensor([ids]), before, torch.arange(len(ids))[None])[0].tolist()
    word, last = b"", 0
    assert max(map(len, map(tokenizer.token_bytes, ids))) > 2, "some tokens are more than a letter"
    for token, row in zip(ids, rows):
        text = tokenizer.token_bytes(token)
        if text == b"-":  # joins, and is no letter
            last = 1
            continue
        letters = text.lstrip(b" ") or text
        word = word + letters if byte_class(text[0]) and byte_class(text[0]) == last else letters
        last = byte_class(text[-1])
        for ends, spelled in ((row[:POSITIONS_PER_END], word), (row[POSITIONS_PER_END:], word[::-1])):
            symbols = [r % CHARACTERS for r in ends if r != NO_FEATURE]
            assert symbols == [*spelled, END_OF_WORD][:POSITIONS_PER_END]
        assert all(r // CHARACTERS == place for place, r in enumerate(row) if r != NO_FEATURE)


def test_damaged_or_missing_weights_raise_an_error_that_names_the_file(model, tokenizer, tmp_path):
    save_model(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:5], b"", whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(UserError, match="model.safetensors"):
            load_model(tmp_path, torch.float32)
    path.unlink()
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_llama_has_the_same_logits_in_transformers(tokenizer, tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = fresh(replace(LLAMA, tied_embeddings=tied)).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    save_model(tmp_path, model, tokenizer)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(expected(tokens(2, 20)).logits, model(tokens(2, 20)), rtol=1e-4, atol=1e-4)


def test_attempts_behind_a_shared_prompt_are_as_likely_as_alone(model):
    from nanoghost.train.rollouts import rollout_logprobs

    prompts = [[5, 9, 7], [3, 4, 8, 6, 11]]
    attempts = [[[10, 12, 2], [13], [10, 12, 14, 15]], [[2], [9, 9, 9]]]
    shared = rollout_logprobs(model, prompts, attempts)
    flat = [(p, a) for p, group in zip(prompts, attempts) for a in group]
    for logp, (prompt, attempt) in zip(shared, flat):
        ids = torch.tensor([prompt + attempt])
        alone = model.logprobs(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
        assert torch.allclose(logp[: len(attempt)], alone, atol=1e-4)
        assert (logp[len(attempt) :] == 0).all()
