"""The ablations: all switches on give the ghost and all off GPT-2, every switch matters, and the figures add up."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nanoghost import hardware
from nanoghost.data.registry import open_data_source
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.lab import ablation_recipes, ablation_runs, ablation_training, ablations, depth_sweep
from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import Recipe
from nanoghost.lab.ablation_report import cumulative_speedups
from nanoghost.lab.ablation_training import AblationOptimizer
from nanoghost.model import character_features
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.optim.optimizer import Optimizer
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train import pretrain
from tests.support.toys import toy_text

TOY = {"vocab_size": 320, "width": 64, "depth": 2, "context": 32, "rows": 4}


def toy(recipe: Recipe) -> Recipe:
    """The same switches at toy size. A size that the recipe changes stays as the recipe has it."""
    toy_sizes = {key: TOY[key] for key in TOY if getattr(recipe, key) == getattr(Recipe(), key)}
    return replace(recipe, **toy_sizes, bigram_rows=recipe.bigram_rows // 256, head_width=recipe.head_width // 2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text()], 320)


@pytest.fixture(scope="module")
def text(tokenizer):
    return torch.tensor(tokenizer.encode(toy_text()))


def random_batch(text, rows, context, seed=0):
    """(inputs, targets), each (rows, context)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - context, (rows, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def with_character_features(model, tokenizer):
    table = character_features.character_table(tokenizer)
    model.character_table[: len(table)] = table
    model.character_tokens.copy_(character_features.single_character_tokens(model.character_table))
    return model


def last_loss(model, optimizer, text) -> torch.Tensor:
    """Train for three steps."""
    for step in range(3):
        loss = -model.logprobs(*random_batch(text, 4, 32, step)).mean()
        loss.backward()
        optimizer.step(1.0)
    return loss


def test_with_all_switches_on_it_is_the_ghost(tokenizer, text):
    recipe, dtype = toy(Recipe()), hardware.compute_dtype()
    torch.manual_seed(1)
    ghost = with_character_features(Ghost(GhostConfig(320, 32, 2, 64, 32, bigram_rows=128)), tokenizer).cast(dtype)
    torch.manual_seed(1)
    ablation = with_character_features(AblationModel(recipe), tokenizer).cast(dtype)
    ghost_loss = last_loss(ghost, Optimizer(ghost, ablation_training.update_rules(recipe, 1.0), dtype), text)
    ablation_loss = last_loss(ablation, AblationOptimizer(ablation, 1.0), text)
    assert torch.equal(ghost_loss, ablation_loss)
    ablation_parameters = dict(ablation.named_parameters())
    for name, p in ghost.named_parameters():
        assert torch.equal(p, ablation_parameters[name]), name


def layer_norm(x, module):
    return F.layer_norm(x, (64,), module.weight, module.bias)


def test_with_all_switches_off_it_is_gpt2(text):
    recipe = toy(ablation_recipes.GPT2)
    model = AblationModel(recipe)
    for p in model.parameters():  # so that no parameter is 0 or 1
        p.data.add_(torch.randn_like(p) * 0.1)
    tokens, targets = random_batch(text, 4, 32)
    x = model.embedding(tokens) + model.position_embedding.weight[:32]
    for block in model.blocks:
        attention, mlp = block.attention, block.mlp
        q, k, v = attention.qkv(layer_norm(x, block.attention_norm)).split(64, -1)
        heads = (z.view(4, 32, 2, 32).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        x = x + attention.out(y)
        h = layer_norm(x, block.mlp_norm)
        x = x + mlp.down(F.gelu(mlp.up(h), approximate="tanh"))
    logits = layer_norm(x, model.final_norm) @ model.embedding.weight.T
    expected = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(4, 32)
    torch.testing.assert_close(model.logprobs(tokens, targets), expected, rtol=1e-4, atol=1e-4)


def test_the_cumulative_recipes_lead_from_gpt2_to_todays_recipe():
    recipes = list(ablation_recipes.cumulative().values())
    assert recipes[0] == ablation_recipes.GPT2
    assert recipes[-1] == Recipe()


def losses_of(recipe: Recipe, tokenizer, text) -> torch.Tensor:
    """The losses of four training steps, and of another batch afterwards."""
    torch.manual_seed(0)
    model = with_character_features(AblationModel(recipe), tokenizer).cast(getattr(torch, recipe.dtype))
    optimizer = AblationOptimizer(model, 1.0)
    losses = []
    for step in range(4):
        progress = step / 4
        rows, context = ablation_training.batch_shape(recipe, progress)
        loss = -model.logprobs(*random_batch(text, rows, context, step)).mean()
        loss.backward()
        for group in model.parameter_groups().values():
            assert all(p.grad is not None for p in group)
        optimizer.set_momentum(ablation_training.momentum(recipe, progress))
        optimizer.step(ablation_training.lr_multiplier(recipe, progress))
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(-model.logprobs(*random_batch(text, 4, 32, seed=9)).mean().item())
    return torch.tensor(losses)


CHANGED_RECIPES = ablation_recipes.leave_one_out() | ablation_recipes.alternatives()


@pytest.mark.parametrize(
    "name",
    [name for name, recipe in CHANGED_RECIPES.items() if not recipe.ema_decay],  # averaged in ablation_runs
)
def test_every_switch_changes_the_losses(name, tokenizer, text):
    changed = losses_of(toy(CHANGED_RECIPES[name]), tokenizer, text)
    today = losses_of(toy(Recipe()), tokenizer, text)
    assert changed.isfinite().all()
    assert not torch.equal(changed, today)
    if name in ("without bf16 matmuls", "without chunked loss"):
        torch.testing.assert_close(changed, today, rtol=2e-2, atol=2e-2)  # the same up to rounding


class PowerLawRuns(ablations.Runs):
    """Runs whose bits per byte follow a formula. `laws`: recipe name -> (offset, seconds per token)."""

    def __init__(self, laws):
        self.laws = laws
        self.lr_scale = lambda name, recipe: 1.0
        self.seconds_per_token = lambda name, recipe: laws[name][1]

    def run(self, name, recipe, tokens, lr_scale, seed, split="test"):
        return {"bpb": self.laws[name][0] - 0.2 * math.log(tokens) + 0.01 * seed, "tokens": tokens}


@pytest.mark.parametrize("tokens", [40_000, 150_000, 380_000])
def test_tokens_to_a_target_are_interpolated_between_two_lengths(tokens):
    runs = PowerLawRuns({"today": (4.0, 1e-4)})
    bpb = 4.0 - 0.2 * math.log(tokens) + 0.01
    assert math.isclose(runs.tokens_to(bpb, "today", Recipe(), 1), tokens, rel_tol=1e-6)


def test_a_target_beyond_the_longest_run_gives_none():
    runs = PowerLawRuns({"today": (4.0, 1e-4)})
    target = 4.0 - 0.2 * math.log(700_000)  # takes 70 s
    assert runs.tokens_to(target, "today", Recipe(), 0, runs.longest_length("today", Recipe())) is None


def test_relative_time_of_twice_the_tokens_and_of_slower_steps():
    law = 0.2 * math.log(2)  # a recipe that is worse by this needs twice the tokens
    runs = PowerLawRuns({"today": (4.0, 1e-4), "without x": (4.0 + law, 1e-4), "without y": (4.0, 1.5e-4)})
    x, y = replace(Recipe(), qk_norm=False), replace(Recipe(), rotary=False)
    figures = ablations.relative_figures(runs, {"without x": x, "without y": y}, [1, 2, 3])
    assert math.isclose(figures["without x"]["relative_time"]["mean"], 2.0, rel_tol=1e-6)
    assert math.isclose(figures["without x"]["bpb_difference"]["mean"], law, rel_tol=1e-6)
    assert math.isclose(figures["without y"]["relative_time"]["mean"], 1.5, rel_tol=1e-6)


@pytest.fixture
def power_law_figures():
    """(targets, figures) of the cumulative recipes: each needs exp(-0.5) times the tokens of the previous one."""
    recipes = ablation_recipes.cumulative()
    laws = {name: (5.0 - 0.1 * i, 5e-5) for i, name in enumerate(recipes)}
    laws |= dict.fromkeys(ablation_recipes.SPEED_ONLY, (laws[ablations.FIRST_REFERENCE][0], 1e-4))
    return ablations.cumulative_figures(PowerLawRuns(laws), recipes, [1, 2])


def test_a_recipe_with_half_the_speed_takes_twice_the_time_to_the_first_target(power_law_figures):
    _, figures = power_law_figures
    first = figures[ablations.FIRST_REFERENCE]["seconds"][0]["mean"]
    assert first <= ablation_runs.MAX_SECONDS
    assert math.isclose(figures["2019"]["seconds"][0]["mean"], 2 * first, rel_tol=1e-6)


def test_each_target_is_measured_for_one_half_of_the_recipes(power_law_figures):
    targets, figures = power_law_figures
    middle = list(figures).index(ablations.SECOND_REFERENCE)
    for i, recipe_figures in enumerate(figures.values()):
        to_first, to_second = recipe_figures["seconds"]
        assert (to_first is not None) == (i <= middle)
        assert (to_second is not None) == (i >= middle)
    assert targets[1] < targets[0]
    assert targets[1] == figures[ablations.SECOND_REFERENCE]["bpb"]["mean"]


def test_speedups_multiply_to_the_total(power_law_figures):
    """By the law a recipe saves the same factor everywhere; the tolerance is for the mean over two seeds."""
    _, figures = power_law_figures
    factor = math.exp(0.5 * (len(figures) - 1 - list(figures).index(ablations.FIRST_REFERENCE)))
    assert math.isclose(math.prod(cumulative_speedups(figures).values()), 2 * factor, rel_tol=1e-3)


def test_a_speedup_needs_the_previous_recipe(power_law_figures):
    _, figures = power_law_figures
    assert "+ zero init" in cumulative_speedups(figures)
    without_previous = {name: r for name, r in figures.items() if name != "+ Muon"}
    assert "+ zero init" not in cumulative_speedups(without_previous)


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_another_depth_is_for_recipes_of_todays_size(depth):
    recipes = {"today": Recipe()} | ablation_recipes.leave_one_out() | ablation_recipes.alternatives()
    resized = ablations.with_depth(recipes, depth)
    assert "without rotary positions" in resized
    assert "4 layers of 128" not in resized
    assert ("one head of 128" in resized) == (depth == 4)
    for recipe in resized.values():
        assert (recipe.depth, recipe.width, recipe.width % recipe.head_width) == (depth, 64 * depth, 0)


@pytest.fixture
def toy_ledger(nanoghost, toy_file, monkeypatch):
    """Run `lab ledger` with few recipes of toy size: (exit code, standard output, standard error)."""
    recipes = {
        ablations.FIRST_REFERENCE: toy(ablation_recipes.cumulative()[ablations.FIRST_REFERENCE]),
        ablations.SECOND_REFERENCE: toy(ablation_recipes.cumulative()[ablations.SECOND_REFERENCE]),
        "today": toy(Recipe()),
    }
    without_values = {"without values": replace(recipes["today"], value_embeddings=False)}
    growing_batch = {"growing batch": replace(recipes["today"], row_ramp=True, rows=8)}
    for module in (ablations, ablation_runs):
        monkeypatch.setattr(module, "cumulative", lambda: recipes)
    monkeypatch.setattr(ablations, "leave_one_out", lambda: without_values)
    monkeypatch.setattr(ablations, "alternatives", lambda: growing_batch)
    monkeypatch.setattr(ablation_runs, "example_texts", list)
    step = TOY["rows"] * TOY["context"]
    lengths = {
        "LENGTHS": tuple(step * n for n in (2, 4, 8, 16)),
        "DEFAULT_LENGTH": step * 8,
        "TUNING_LENGTH": step * 4,
        "LONG_TUNING_LENGTH": step * 16,
    }
    for name, value in lengths.items():
        for module in (ablations, ablation_runs):
            monkeypatch.setattr(module, name, value, raising=False)
    return partial(nanoghost, "lab", "ledger", "--data", toy_file, "--seeds", 2, "--json")


def test_the_ledger_command_runs_each_run_once(toy_ledger, toy_file, tmp_path, home):
    code, out, err = toy_ledger("--out", tmp_path / "ledger.md")
    assert code == 0, err
    figures = json.loads(out)
    assert (
        figures["cumulative"]["today"]["bpb"]["mean"] < figures["cumulative"][ablations.FIRST_REFERENCE]["bpb"]["mean"]
    )
    assert set(figures["leave_one_out"]) == {"without values"}
    assert set(figures["alternatives"]) == {"growing batch"}

    text = (tmp_path / "ledger.md").read_text()
    documents = list(open_data_source(str(toy_file)).documents())
    train, test = ([d.text for d in documents if d.split == split] for split in ("train", "test"))
    baseline = kneser_ney_bpb(train, test)
    assert figures["kneser_ney_bpb"] == baseline
    assert text.count(f"{baseline:.3f}") >= 3, "the baseline is in every table"
    assert "ledger.svg" in text
    assert "without values" in text
    assert (tmp_path / "ledger.svg").read_text().startswith("<svg")

    folder = home / "lab" / "ledger"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, out, err = toy_ledger()
    assert code == 0, err
    assert json.loads(out) == figures
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    code, out, err = toy_ledger("--recipes", "values", "--force")
    assert code == 0, err
    bpb_again = json.loads(out)["leave_one_out"]["without values"]["bpb"]
    assert bpb_again == figures["leave_one_out"]["without values"]["bpb"]
    assert "timing without values" in err


def test_longer_runs_of_another_depth(toy_ledger, tmp_path):
    code, out, err = toy_ledger("--steps", 12, "--depth", 3, "--out", tmp_path / "longer.md")
    assert code == 0, err
    assert "without values" in (tmp_path / "longer.svg").read_text()
    assert "validation bpb" in (tmp_path / "longer.md").read_text()
    figures = json.loads(out)["longer_runs"]
    assert list(figures) == ["today", "without values", "growing batch"]
    assert figures["today"]["bpb_difference"] == {"mean": 0, "spread": 0}
    assert figures["without values"]["bpb_difference"]["mean"] != 0


@pytest.mark.parametrize("flags, message", [(("--recipes", "nonsense"), "nonsense"), (("--depth", 3), "--steps")])
def test_an_error_names_the_wrong_flag_of_the_ledger(toy_ledger, flags, message):
    code, _, err = toy_ledger(*flags)
    assert code == 2
    assert message in err


def test_the_dial_is_compared_with_its_neighbors(nanoghost, toy_file, home, monkeypatch):
    for module in (pretrain, depth_sweep):
        monkeypatch.setattr(module, "example_texts", list)
    arguments = ("lab", "dial", "--data", toy_file, "--minutes", "0.03", "--choices", "1x320", "--json")
    code, out, err = nanoghost(*arguments)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(row["depth"], row["vocabulary"], row["dial"]) for row in rows] == [(1, 320, False), (2, 4096, True)]
    assert min(row["from_best"] for row in rows) == 0
    assert rows[0]["steps"] > rows[1]["steps"] >= 1, "in the same time the smaller model makes more steps"
    assert not list((home / "models").glob("dial-*")), "the models are deleted"
    assert nanoghost(*arguments)[1] == out, "the stored results are used again"


def test_a_choice_without_a_vocabulary_is_an_error(nanoghost):
    code, _, err = nanoghost("lab", "dial", "--choices", "4")
    assert code == 2
    assert "--choices" in err
