"""What holds for both model families: which tokens a score may depend on, initial loss, parameter and FLOP counts,
folders on disk."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.model.character_features import NO_FEATURE
from nanoghost.model.copy_heads import POINTER_WIDTH
from nanoghost.model.ghost import GhostConfig
from nanoghost.model.registry import new_model
from nanoghost.model.tensor_names import gguf_name, huggingface_name, huggingface_name_of_gguf
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.rollouts import rollout_logprobs
from tests.support.toy_models import CONFIGS, LLAMA, V, random_tokens, trained_model, untrained_model
from tests.support.toys import toy_text


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def model(config):
    return trained_model(config)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(200)], V)


# ── which tokens a score may depend on ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("t", [0, 5, 11])
def test_changing_a_token_changes_the_scores_from_there_on_only(model, t):
    x_BT = random_tokens(1, 12)
    changed_BT = x_BT.clone()
    changed_BT[0, t] = (x_BT[0, t] + 1) % V
    before, after = model(x_BT), model(changed_BT)
    assert_close(after[:, :t], before[:, :t], rtol=0, atol=0)
    assert ((after - before)[0, t:].abs().amax(-1) > 1e-4).all()


def test_packed_conversations_have_the_scores_of_separate_ones(model):
    """Nothing passes from one to the next: neither through attention nor, in a ghost, through bigrams."""
    conversations = [random_tokens(1, length) for length in (5, 8, 1)]
    segments = torch.tensor([[1] * 5 + [2] * 8 + [3]])
    packed = model(torch.cat(conversations, 1), segments_BT=segments)
    for alone, part in zip(conversations, packed.split([5, 8, 1], 1)):
        assert_close(part, model(alone), rtol=1e-4, atol=1e-5)


def test_changing_a_packed_conversation_does_not_change_the_next_ones(model):
    first, *others = (random_tokens(1, length) for length in (5, 8, 1))
    segments = torch.tensor([[1] * 5 + [2] * 8 + [3]])
    before = model(torch.cat([first, *others], 1), segments_BT=segments)
    after = model(torch.cat([(first + 1) % V, *others], 1), segments_BT=segments)
    assert_close(after[:, 5:], before[:, 5:], rtol=0, atol=0)


def test_without_segments_conversations_of_a_row_influence_each_other(model):
    """Otherwise the tests of packing would prove nothing."""
    row = torch.cat([random_tokens(1, length) for length in (5, 8, 1)], 1)
    packed = model(row, segments_BT=torch.tensor([[1] * 5 + [2] * 8 + [3]]))
    assert (model(row)[:, 5:] - packed[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("grad", [True, False])
def test_logprobs_are_the_log_softmax_of_the_scores(model, grad):
    x_BT, targets_BT = random_tokens(2, 9), random_tokens(2, 10)[:, 1:]
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    expected = model(x_BT, segments_BT=segments).log_softmax(-1).gather(-1, targets_BT[..., None])[..., 0]
    with torch.set_grad_enabled(grad):
        assert_close(model.logprobs(x_BT, targets_BT, segments), expected, rtol=1e-4, atol=1e-4)


def test_rollouts_that_share_a_prompt_have_the_logprobs_of_separate_ones(model):
    prompts = [[5, 9, 7], [3, 4, 8, 6, 11]]
    rollouts = [[[10, 12, 2], [13], [10, 12, 14, 15]], [[2], [9, 9, 9]]]
    together = rollout_logprobs(model, prompts, rollouts)
    pairs = [(prompt, rollout) for prompt, group in zip(prompts, rollouts) for rollout in group]
    for logp, (prompt, rollout) in zip(together, pairs):
        ids = torch.tensor([prompt + rollout])
        alone = model.logprobs(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :]
        assert torch.allclose(logp[: len(rollout)], alone, atol=1e-4)
        assert (logp[len(rollout) :] == 0).all()


# ── initial weights and counts ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_model_has_the_loss_of_a_uniform_distribution_and_finite_gradients(config, dtype):
    model = untrained_model(config).cast(dtype)
    x_BT = random_tokens(4, 24)
    loss = -model.logprobs(x_BT, x_BT.roll(-1, 1)).mean()
    assert abs(loss.item() - math.log(V)) < 0.05
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def expected_parameter_counts(config) -> dict[str, int]:
    """By the description of the architecture in the docstrings."""
    c, D = config, config.width
    if isinstance(c, GhostConfig):
        value_embeddings = math.ceil(c.depth / 2)  # every second layer, the last one included
        return {
            "matrices": c.depth * (3 + 1 + 4 + 4) * D * D + 4 * POINTER_WIDTH * D,
            "head": V * D,
            "embeddings": V * D * (1 + value_embeddings) + (NO_FEATURE + 1) * D,
            "bigram_embedding": c.bigram_rows * D,
            "scalars": 2 * c.depth + value_embeddings + 4 * (1 + D) + D,
        }
    attention = 2 * D * D + 2 * D * D * c.key_value_heads // c.heads
    return {
        "matrices": c.depth * (attention + 3 * D * c.mlp_width),
        "head": V * D,
        "embeddings": 0 if c.tied_embeddings else V * D,
        "scalars": (2 * c.depth + 1) * D,
    }


def test_parameter_counts(config):
    assert untrained_model(config).parameter_counts() == expected_parameter_counts(config)


def test_each_parameter_is_in_exactly_one_group(config):
    model = untrained_model(config)
    grouped = [id(p) for parameters in model.parameter_groups().values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_flops_per_token_are_those_that_pytorch_counts(config):
    """The matmuls of a training step are counted. Only half of a T x T attention is useful, the rest is masked."""
    B, T = 2, 16
    model = untrained_model(config)
    with FlopCounterMode(display=False) as counter:
        (-model.logprobs(random_tokens(B, T), random_tokens(B, T)).mean()).backward()
    flops = {operation.__name__.split(".")[0]: n for operation, n in counter.get_flop_counts()["Global"].items()}
    attention = flops.pop("bmm") + flops.pop("baddbmm")
    assert model.flops_per_token(T) * B * T == sum(flops.values()) + attention // 2
    assert model.flops_per_token() == model.flops_per_token(config.context)


def test_parameters_can_be_counted_without_allocating_the_model(config):
    """On PyTorch's meta device."""
    with torch.device("meta"):
        model = new_model(replace(config, vocab_size=10**6))
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.parameter_counts()["head"] == 10**6 * config.width


# ── on disk ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_is_loaded_bit_for_bit(model, tokenizer, tmp_path, dtype):
    model.cast(dtype)
    save_model(tmp_path, model, tokenizer)
    loaded, loaded_tokenizer = load_model(tmp_path, dtype)
    assert loaded.config == model.config
    assert torch.equal(loaded(random_tokens(2, 20)), model(random_tokens(2, 20)))
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    assert loaded_tokenizer.encode("The king sees.") == tokenizer.encode("The king sees.")


@pytest.mark.parametrize("damage", ["first half", "five bytes", "empty", "last byte missing", "missing"])
def test_damaged_or_missing_weights_raise_an_error_that_names_the_file(model, tokenizer, tmp_path, damage):
    save_model(tmp_path, model, tokenizer)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    lengths = {"first half": len(content) // 2, "five bytes": 5, "empty": 0, "last byte missing": len(content) - 1}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: lengths[damage]])
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_llama_has_the_same_logits_in_transformers(tokenizer, tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = untrained_model(replace(LLAMA, tied_embeddings=tied)).requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    save_model(tmp_path, model, tokenizer)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(expected(random_tokens(2, 20)).logits, model(random_tokens(2, 20)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True, "out_bias": True, "qk_norm": True}], ids=["plain", "all parts"]
)
def test_each_llama_tensor_has_a_name_of_its_own_in_huggingface_and_gguf(changes):
    names = list(untrained_model(replace(LLAMA, **changes)).state_dict())
    in_huggingface = [huggingface_name(name) for name in names]
    in_gguf = [gguf_name(name) for name in in_huggingface]
    assert len(set(in_gguf)) == len(names)
    assert [huggingface_name_of_gguf(name) for name in in_gguf] == in_huggingface
