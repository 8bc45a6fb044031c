"""LoRA: updates and their gradients, adapters of single rows, merging, adapters as models on the command line, PEFT."""

import json

import pytest
import safetensors.torch
import torch

from nanoghost.commands.models import adapters_of
from nanoghost.errors import UserError
from nanoghost.formats import peft
from nanoghost.formats.model_folder import load_model, load_with_adapters
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import attach_adapters, merge_adapter, new_adapter
from nanoghost.model.tensor_names import MATRIX_MODULES
from nanoghost.optim.optimizer import Optimizer
from nanoghost.tokenizer.chat_format import render
from nanoghost.train.hyperparameters import LORA_GROUP
from tests.test_training import killed_after_checkpoint, losses

CONFIG = LlamaConfig(97, 32, 3, 32, 4, 2, 48, qkv_bias=True)
IDS = torch.randint(97, (4, 11), generator=torch.Generator().manual_seed(0))


def randomized(adapter, seed=0):
    """The adapter with random weights, since a new one changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for t in adapter.tensors():
        t.data = torch.randn(t.shape, generator=generator).to(t) * 0.2
    return adapter


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Llama(CONFIG)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model


@torch.no_grad()
def logits(model, **more):
    return model(IDS, **more)


def test_a_new_adapter_does_not_change_the_logits(model):
    before = logits(model)
    attach_adapters(model, [new_adapter(model, 4, None, None, 0)])
    assert torch.equal(logits(model), before)


def test_detaching_an_adapter_restores_the_base(model):
    before = logits(model)
    attach_adapters(model, [randomized(new_adapter(model, 4, None, None, 0))])
    assert (logits(model) - before).abs().max() > 0.1
    model.adapters = []
    assert torch.equal(logits(model), before)


def test_an_adapter_adds_scaled_low_rank_products_to_the_target_matrices(model):
    adapter = randomized(new_adapter(model, 4, 8.0, "q,down", 0))
    attach_adapters(model, [adapter])
    with_adapter = logits(model)
    assert set(adapter.updates) == {(layer, name) for layer in range(3) for name in ("q", "down")}
    for (layer, name), (a, b, scale) in adapter.updates.items():
        assert scale == 8.0 / 4
        model.blocks[layer].matrix(name).data += 2.0 * torch.einsum("nr,rm->nm", b.data, a.data)
    model.adapters = []
    assert torch.allclose(logits(model), with_adapter, atol=1e-4)


def test_merging_an_adapter_equals_applying_it(model):
    attach_adapters(model, [randomized(new_adapter(model, 4, None, None, 0))])
    applied = logits(model)
    assert merge_adapter(model).adapters == []
    assert torch.allclose(logits(model), applied, atol=1e-4 * applied.abs().max())


def test_merging_without_an_adapter_changes_nothing(model):
    before = logits(model)
    assert torch.equal(logits(merge_adapter(model)), before)


ROWS = torch.tensor([1, -1, 0, 1])  # index of the adapter of each row of IDS; -1: none


@pytest.fixture
def two_adapters(model):
    adapters = [
        randomized(new_adapter(model, 2, None, None, 0), seed=2),
        randomized(new_adapter(model, 4, None, "v,gate", 0), seed=4),
    ]
    attach_adapters(model, adapters)
    return adapters


@pytest.mark.parametrize("row", range(4))
def test_each_row_of_a_batch_uses_its_own_adapter(model, two_adapters, row):
    mixed = logits(model, adapters_B=ROWS)
    model.adapters = [] if ROWS[row] < 0 else [two_adapters[ROWS[row]]]
    assert torch.allclose(mixed[row], logits(model)[row], atol=1e-5)


def test_a_batch_must_say_which_of_several_adapters_a_row_uses(model, two_adapters):
    with pytest.raises(AssertionError, match="adapters_B"):
        logits(model)


@torch.no_grad()
def test_adapters_of_rows_work_with_a_cache(model, two_adapters):
    cache = model.new_cache(4, 11)
    steps = [model(IDS[:, t : t + 1], cache, adapters_B=ROWS) for t in range(11)]
    assert torch.allclose(torch.cat(steps, 1), logits(model, adapters_B=ROWS), atol=1e-4)


def test_gradients_of_an_adapter_are_those_of_an_explicit_sum_of_matrices(model):
    """Against the same model with W + scale B A as its weights, differentiated by autograd in fp64."""
    model.double()
    adapter = randomized(new_adapter(model, 3, None, None, 0))
    attach_adapters(model, [adapter])
    targets = IDS.roll(-1, 1)
    model.logprobs(IDS, targets).sum().backward()
    gradients = {key: (a.grad, b.grad) for key, (a, b, _) in adapter.updates.items()}
    model.adapters = []
    weights = {}
    for (layer, name), (a, b, scale) in adapter.updates.items():
        a.grad = b.grad = None
        matrix = model.blocks[layer].matrix(name)
        weights[f"blocks.{layer}.{MATRIX_MODULES[name]}.weight"] = matrix.detach() + scale * (b @ a)
    scores = torch.func.functional_call(model, weights, (IDS,)).double()  # the logits of forward are in fp32
    torch.log_softmax(scores, -1).gather(-1, targets[..., None]).sum().backward()
    for key, (a, b, _) in adapter.updates.items():
        for gradient, expected in zip(gradients[key], (a.grad, b.grad)):
            assert torch.allclose(gradient, expected, atol=1e-4 * expected.abs().max()), key


def test_the_base_gets_no_gradients(model):
    attach_adapters(model, [randomized(new_adapter(model, 3, None, None, 0))])
    model.logprobs(IDS, IDS.roll(-1, 1)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def train_adapter(model) -> tuple[list[float], Optimizer]:
    """(losses of 30 steps, the optimizer)."""
    attach_adapters(model, [new_adapter(model, 4, None, None, 0)])
    optimizer = Optimizer(model, {"lora": LORA_GROUP}, torch.float32)
    losses = []
    for _ in range(30):
        loss = -model.logprobs(IDS, IDS.roll(-1, 1)).mean()
        loss.backward()
        optimizer.step(4.0)
        losses.append(loss.item())
    return losses, optimizer


def test_training_lowers_the_loss_and_does_not_change_a_bit_of_the_base(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses, _ = train_adapter(model)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_optimizer_state_is_that_of_the_adapter_alone(model):
    _, optimizer = train_adapter(model)
    parameters = sum(t.numel() for t in model.adapters[0].tensors())
    assert sum(t.numel() for t in optimizer.state().values()) == 3 * parameters + 1  # masters, two moments; steps


# ── on the command line ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def toy(nanoghost, toy_file):
    """Name of a toy Llama."""
    options = ("--arch", "llama", "--steps", 2, "--depth", 2, "--context", 160, "--batch", 2, "--vocab-size", 320)
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", *options)
    assert code == 0, err
    return "toy"


SHORT = ("--steps", 4, "--conversations", 60, "--batch", 2)


@pytest.fixture
def toy_with_adapter(nanoghost, toy):
    code, _, err = nanoghost("sft", toy, "--lora", 2, "--name", "me", *SHORT)
    assert code == 0, err
    return toy


def test_sft_with_lora_writes_an_adapter_named_base_at_name(nanoghost, toy):
    weights = (ModelFolder(toy).path / "model.safetensors").read_bytes()
    code, out, err = nanoghost("sft", toy, "--lora", 2, "--name", "me", *SHORT, "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "toy@me"
    files = {p.name for p in ModelFolder("toy@me").path.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "card.json", "events.jsonl", ".lock"}
    assert (ModelFolder(toy).path / "model.safetensors").read_bytes() == weights


def test_an_adapter_can_be_trained_further_by_sft_and_rl(nanoghost, toy_with_adapter):
    code, _, err = nanoghost("sft", "toy@me", "--name", "more", *SHORT)
    assert code == 0, err
    tiny = ("--steps", 1, "--problems", 2, "--rollouts", 2, "--max-tokens", 4, "--eval-problems", 2)
    code, _, err = nanoghost("rl", "toy@me", "--name", "toy@rl", *tiny)
    assert code == 0, err
    assert sorted(adapters_of("toy")) == ["toy@me", "toy@more", "toy@rl"]
    model, _ = load_model(ModelFolder("toy@more").path, torch.float32)
    [adapter] = model.adapters
    _, b_NR, _ = next(iter(adapter.updates.values()))
    assert b_NR.abs().max() > 0
    assert adapter.targets == list(MATRIX_MODULES)


def test_commands_take_an_adapter_like_any_model(nanoghost, toy_with_adapter):
    commands = (
        ("eval", "toy@me", "--problems", 2),
        ("report", "toy@me"),
        ("show", "toy@me"),
        ("list",),
        ("chat", "toy@me", "--prompt", "Hello", "--max-tokens", 4),
    )
    for words in commands:
        code, _, err = nanoghost(*words)
        assert code == 0, (words, err)
    assert "rank 2" in (ModelFolder("toy@me").path / "report.md").read_text()


def test_mistakes_with_adapters_end_in_one_line_and_change_nothing(nanoghost, toy_with_adapter, toy_file):
    models = ModelFolder(toy_with_adapter).path.parent
    before = sorted(p.name for p in models.iterdir())
    for words, hint in (
        (("sft", "toy", "--lora", 0), "at least 1"),
        (("sft", "toy", "--lora", 2, "--lora-targets", "q,x"), "unknown 'x'"),
        (("sft", "toy", "--lora", 2, "--name", "other@x"), "toy@other@x"),
        (("sft", "toy", "--name", "toy@x"), "--lora"),
        (("sft", "toy@me", "--lora", 2, "--name", "x"), "already"),
        (("sft", "toy@me", "--name", "me"), "differ"),
        (("pretrain", "--name", "toy@x", "--data", toy_file), "only adapters"),
        (("rename", "toy@me", "me"), "toy@"),
        (("rename", "toy@me", "other@me"), "toy@"),
        (("rename", "toy", "toy@x"), "toy@"),
        (("rm", "toy", "--yes"), "toy@me"),
        (("chat", "toy@you", "--prompt", "hello"), "toy@you"),
    ):
        code, _, err = nanoghost(*words)
        assert code == 2, (words, err)
        assert hint in err.strip().splitlines()[-1], (words, err)
        assert "Traceback" not in err, (words, err)
    assert sorted(p.name for p in models.iterdir()) == before


def test_renaming_a_base_renames_its_adapters(nanoghost, toy_with_adapter):
    assert nanoghost("rename", "toy@me", "toy@you")[0] == 0
    assert nanoghost("rename", "toy", "big")[0] == 0
    assert adapters_of("big") == ["big@you"]
    assert adapters_of("toy") == []
    assert nanoghost("chat", "big@you", "--prompt", "Hello", "--max-tokens", 2)[0] == 0
    assert nanoghost("rm", "big@you", "--yes")[0] == 0
    assert nanoghost("rm", "big", "--yes")[0] == 0


def test_an_adapter_of_a_replaced_base_is_refused(nanoghost, toy_with_adapter, toy_file):
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 1, "--depth", 2, "--force")
    assert code == 0, err
    code, _, err = nanoghost("chat", "toy@me", "--prompt", "Hello")
    assert code == 2
    assert "another model" in err


def test_rows_with_several_loaded_adapters_equal_each_adapter_alone(nanoghost, toy):
    for name, seed in (("a", 0), ("b", 1)):
        assert nanoghost("sft", toy, "--lora", 2, "--name", name, "--seed", seed, *SHORT)[0] == 0
    folders = [ModelFolder(f"toy@{name}").path for name in "ab"]
    model, tokenizer = load_with_adapters(folders, torch.float32)
    ids = torch.tensor([render([{"role": "user", "content": "Who are you?"}], tokenizer, True)[0]] * 2)
    with torch.no_grad():
        both = model(ids, adapters_B=torch.tensor([0, 1]))
        for row, folder in enumerate(folders):
            alone, _ = load_model(folder, torch.float32)
            assert torch.allclose(both[row], alone(ids)[row], atol=1e-5)
    assert not torch.equal(both[0], both[1])


def test_adapter_training_resumes_bit_for_bit_after_kill_9(nanoghost, toy):
    common = (toy, "--lora", 4, "--steps", 40, "--conversations", 200, "--batch", 2)
    assert nanoghost("sft", *common, "--name", "whole")[0] == 0
    folder = ModelFolder("toy@killed")
    killed_after_checkpoint("sft", *common, "--name", "killed")
    assert nanoghost("sft", *common, "--name", "killed")[0] == 0
    assert losses("toy@killed", "sft") == losses("toy@whole", "sft")
    whole = (ModelFolder("toy@whole").path / "adapter_model.safetensors").read_bytes()
    assert (folder.path / "adapter_model.safetensors").read_bytes() == whole


@pytest.fixture
def adapter_folder(model, tmp_path):
    """An adapter of rank 2 on the queries of `model`."""
    folder = tmp_path / "toy@me"
    peft.save_adapter(folder, randomized(new_adapter(model, 2, 8.0, "q", 0)))
    return folder


def change_adapter_config(folder, change: dict) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))


def test_scale_of_a_loaded_adapter_is_alpha_by_rank(model, adapter_folder):
    assert peft.read_adapter(adapter_folder, model.config, torch.float32).updates[0, "q"][2] == 8 / 2


def test_scale_of_a_rslora_adapter_is_alpha_by_the_root_of_the_rank(model, adapter_folder):
    """Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"."""
    change_adapter_config(adapter_folder, {"r": 4, "use_rslora": True})
    path = adapter_folder / "adapter_model.safetensors"
    doubled = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        doubled[name] = torch.cat([tensor, tensor], dim=0 if "lora_A" in name else 1)
    safetensors.torch.save_file(doubled, path)
    assert peft.read_adapter(adapter_folder, model.config, torch.float32).updates[0, "q"][2] == 8 / 4**0.5


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"rank_pattern": {"q_proj": 3}}, "ranks"),
        ({"r": 3}, "does not fit"),
    ],
)
def test_unsupported_adapters_are_refused(model, adapter_folder, change, hint):
    change_adapter_config(adapter_folder, change)
    with pytest.raises(UserError, match=hint):
        peft.read_adapter(adapter_folder, model.config, torch.float32)


def test_an_adapter_with_a_tensor_for_another_module_is_refused(model, adapter_folder):
    """Otherwise part of the adapter would be ignored."""
    path = adapter_folder / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 32)}
    safetensors.torch.save_file(safetensors.torch.load_file(path) | head, path)
    with pytest.raises(UserError, match="lm_head"):
        peft.read_adapter(adapter_folder, model.config, torch.float32)


# ── against PEFT ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_logits_with_an_adapter_equal_those_of_peft(nanoghost, toy):
    peft = pytest.importorskip("peft", reason="peft is not installed: make parity")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")
    assert nanoghost("sft", toy, "--lora", 4, "--name", "me", "--learning-rate", 10, *SHORT)[0] == 0
    model, _ = load_model(ModelFolder("toy@me").path, torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(ModelFolder(toy).path, dtype=torch.float32)
    ids = torch.randint(10, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        without_adapter = base(ids).logits
        expected = peft.PeftModel.from_pretrained(base, ModelFolder("toy@me").path)(ids).logits
        assert (expected - without_adapter).abs().max() > 0.01, "the adapter changes something"
        assert (model(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_an_adapter_saved_by_peft_is_loaded(nanoghost, toy, tmp_path):
    huggingface_peft = pytest.importorskip("peft", reason="peft is not installed: make parity")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")
    base = transformers.AutoModelForCausalLM.from_pretrained(ModelFolder(toy).path, dtype=torch.float32)
    config = huggingface_peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    expected_model = huggingface_peft.get_peft_model(base, config)
    folder = tmp_path / "toy@saved"
    expected_model.save_pretrained(folder)
    model, _ = load_model(ModelFolder(toy).path, torch.float32)
    attach_adapters(model, [peft.read_adapter(folder, model.config, torch.float32)])
    ids = torch.randint(10, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(ids) - expected_model(ids).logits).abs().max() <= 1e-4 * model(ids).abs().max()
