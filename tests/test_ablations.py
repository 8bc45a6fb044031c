"""The ledger: its model is the ghost and GPT-2 at its two ends, every switch does something, and the book-keeping adds up."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanoghost import hardware
from nanoghost.data.registry import open_source
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.lab import ablation_recipes, ablation_training, ablations, depth_sweep
from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import Recipe
from nanoghost.lab.ablation_report import factors_of
from nanoghost.lab.ablation_training import AblationOptimizer
from nanoghost.model import character_features
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.optim.optimizer import Optimizer
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train import pretrain
from tests.support.toys import toy_text

TOY = {"vocab_size": 320, "width": 64, "depth": 2, "context": 32, "rows": 4}


def toy(rung: Recipe) -> Recipe:
    """The same switches at toy size; what differs from today's size stays different."""
    changed = {key: TOY[key] for key in TOY if getattr(rung, key) == getattr(Recipe(), key)}
    return replace(rung, **changed, bigram_rows=rung.bigram_rows // 256, head_width=rung.head_width // 2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text()], 320)


@pytest.fixture(scope="module")
def text(tokenizer):
    return torch.tensor(tokenizer.encode(toy_text()))


def step_of(text, rows, context, step=0):
    at = torch.randint(0, len(text) - context, (rows, 1), generator=torch.Generator().manual_seed(step)) + torch.arange(
        context + 1
    )
    return text[at][:, :-1], text[at][:, 1:]


def with_character_features(model, tokenizer):
    table = character_features.character_table(tokenizer)
    model.character_table[: len(table)] = table
    model.character_tokens.copy_(character_features.single_character_tokens(model.character_table))
    return model


def test_with_all_switches_on_it_is_the_ghost(tokenizer, text):
    rung, models = toy(Recipe()), []
    for make in (lambda: Ghost(GhostConfig(320, 32, 2, 64, 32, bigram_rows=128)), lambda: AblationModel(rung)):
        torch.manual_seed(1)
        model = with_character_features(make(), tokenizer).cast(hardware.compute_dtype())
        optimizer = (
            AblationOptimizer(model, 1.0)
            if isinstance(model, AblationModel)
            else Optimizer(model, ablation_training.update_rules(rung, 1.0), hardware.compute_dtype())
        )
        for step in range(3):
            loss = -model.logprobs(*step_of(text, 4, 32, step)).mean()
            loss.backward()
            optimizer.step(1.0)
        models.append((loss, dict(model.named_parameters())))
    assert torch.equal(models[0][0], models[1][0])
    for name, p in models[0][1].items():
        assert torch.equal(p, models[1][1][name]), name


def layer_norm(x, module):
    return F.layer_norm(x, (64,), module.weight, module.bias)


def test_with_all_switches_off_it_is_gpt2(text):
    rung = toy(ablation_recipes.GPT2)
    model = AblationModel(rung)
    for p in model.parameters():  # nothing is 0 or 1 any more
        p.data.add_(torch.randn_like(p) * 0.1)
    tokens, targets = step_of(text, 4, 32)
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


def test_the_ladder_ends_at_todays_recipe():
    assert list(ablation_recipes.cumulative().values())[-1] == Recipe()
    assert list(ablation_recipes.cumulative().values())[0] == ablation_recipes.GPT2


def lessons(rung: Recipe, tokenizer, text) -> torch.Tensor:
    """Losses of four steps, and of scoring afterwards."""
    torch.manual_seed(0)
    model = with_character_features(AblationModel(rung), tokenizer).cast(getattr(torch, rung.dtype))
    optimizer, losses = AblationOptimizer(model, 1.0), []
    for step in range(4):
        loss = -model.logprobs(*step_of(text, *ablation_training.batch_shape(rung, step / 4), step)).mean()
        loss.backward()
        for group in model.parameter_groups().values():
            assert all(p.grad is not None for p in group)
        optimizer.set_momentum(ablation_training.momentum(rung, step / 4))
        optimizer.step(ablation_training.lr_multiplier(rung, step / 4))
        losses.append(loss.item())
    with torch.no_grad():
        return torch.tensor([*losses, -model.logprobs(*step_of(text, 4, 32, 9)).mean().item()])


@pytest.mark.parametrize(
    "name",
    [
        *ablation_recipes.leave_one_out(),
        *(name for name in ablation_recipes.alternatives() if name != "average of the weights"),
    ],
)
def test_every_switch_changes_what_is_learned(name, tokenizer, text):
    found = lessons(toy({**ablation_recipes.leave_one_out(), **ablation_recipes.alternatives()}[name]), tokenizer, text)
    usual = lessons(toy(Recipe()), tokenizer, text)
    assert found.isfinite().all() and not torch.equal(found, usual)
    if name in ("without bf16 matmuls", "without chunked loss"):
        torch.testing.assert_close(found, usual, rtol=2e-2, atol=2e-2)  # the same lessons, up to rounding


class Lawful(ablations.Runs):
    """Runs that follow a law instead: each rung has its own bits per byte at a token, and seconds for it."""

    def __init__(self, laws):
        self.laws = laws
        self.scale = lambda name, rung: 1.0
        self.rate = lambda name, rung: laws[name][1]

    def run(self, name, rung, tokens, scale, seed, split="test"):
        return {"bpb": self.laws[name][0] - 0.2 * math.log(tokens) + 0.01 * seed, "tokens": tokens}


def test_time_to_a_level_is_found_between_two_lengths():
    runs = Lawful({"today": (4.0, 1e-4)})
    for tokens in (40_000, 150_000, 380_000):
        bpb = 4.0 - 0.2 * math.log(tokens) + 0.01
        assert math.isclose(runs.tokens_to(bpb, "today", Recipe(), 1), tokens, rel_tol=1e-6)
    assert (
        runs.tokens_to(4.0 - 0.2 * math.log(700_000), "today", Recipe(), 0, runs.longest("today", Recipe())) is None
    ), "that takes 70 s"


def test_a_part_that_saves_half_of_the_tokens_counts_twice():
    law = 0.2 * math.log(2)
    runs = Lawful({"today": (4.0, 1e-4), "without x": (4.0 + law, 1e-4), "without y": (4.0, 1.5e-4)})
    x, y = replace(Recipe(), qk_norm=False), replace(Recipe(), rotary=False)
    found = ablations.compared(runs, {"without x": x, "without y": y}, [1, 2, 3])
    assert math.isclose(found["without x"]["times"]["mean"], 2.0, rel_tol=1e-6)
    assert math.isclose(found["without x"]["more_bpb"]["mean"], law, rel_tol=1e-6)
    assert math.isclose(found["without y"]["times"]["mean"], 1.5, rel_tol=1e-6)


def test_the_ladder_counts_from_its_first_rung():
    whole = ablation_recipes.cumulative()
    laws = {name: (5.0 - 0.1 * i, 5e-5) for i, name in enumerate(whole)}
    laws |= dict.fromkeys(ablation_recipes.SPEED_ONLY, (laws[ablations.FIRST][0], 1e-4))
    marks, climb = ablations.climbed(Lawful(laws), whole, [1, 2])
    first = climb[ablations.FIRST]["seconds"][0]["mean"]
    assert first <= ablations.LONGEST and math.isclose(climb["2019"]["seconds"][0]["mean"], 2 * first, rel_tol=1e-6), (
        "its step takes twice as long"
    )
    half = list(whole).index(ablations.HALF)
    for i, r in enumerate(climb.values()):
        assert [s is not None for s in r["seconds"]] == [i <= half, i >= half]
    assert marks[1] < marks[0] and marks[1] == climb[ablations.HALF]["bpb"]["mean"]
    assert "+ zero init" in factors_of(climb) and "+ zero init" not in factors_of(
        {n: r for n, r in climb.items() if n != "+ Muon"}
    )
    # by the law a rung saves as many tokens everywhere, so the factors multiply to the whole, but for the mean over two seeds
    steps = math.exp(0.5 * (len(whole) - 1 - list(whole).index(ablations.FIRST)))
    assert math.isclose(math.prod(factors_of(climb).values()), 2 * steps, rel_tol=1e-3)


def test_other_layers_are_asked_only_of_what_has_todays_size():
    asked = {"today": Recipe()} | ablation_recipes.leave_one_out() | ablation_recipes.alternatives()
    for depth in (1, 3, 4):
        found = ablations.resized(asked, depth)
        assert (
            "without rotary positions" in found
            and "4 layers of 128" not in found
            and ("one head of 128" in found) == (depth == 4)
        )
        assert all(
            (rung.depth, rung.width, rung.width % rung.head_width) == (depth, 64 * depth, 0) for rung in found.values()
        )


def test_the_command_makes_each_run_once(nanoghost, toy_file, tmp_path, monkeypatch, home):
    small = {
        ablations.FIRST: toy(ablation_recipes.cumulative()[ablations.FIRST]),
        ablations.HALF: toy(ablation_recipes.cumulative()[ablations.HALF]),
        "today": toy(Recipe()),
    }
    monkeypatch.setattr(ablations, "cumulative", lambda: small)
    monkeypatch.setattr(
        ablations, "leave_one_out", lambda: {"without values": replace(small["today"], value_embeddings=False)}
    )
    monkeypatch.setattr(
        ablations, "alternatives", lambda: {"growing batch": replace(small["today"], row_ramp=True, rows=8)}
    )
    step = TOY["rows"] * TOY["context"]
    monkeypatch.setattr(ablations, "example_texts", list)
    for name, value in {
        "LENGTHS": tuple(step * n for n in (2, 4, 8, 16)),
        "LENGTH": step * 8,
        "SLOW": step * 16,
        "TUNING": step * 4,
    }.items():
        monkeypatch.setattr(ablations, name, value)
    words = ("lab", "ledger", "--data", toy_file, "--seeds", 2, "--json")
    code, out, err = nanoghost(*words, "--out", tmp_path / "ledger.md")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["ladder"]["today"]["bpb"]["mean"] < figures["ladder"][ablations.FIRST]["bpb"]["mean"]
    assert set(figures["left_out"]) == {"without values"} and set(figures["tried"]) == {"growing batch"}
    text = (tmp_path / "ledger.md").read_text()
    counted = kneser_ney_bpb(
        *([d.text for d in open_source(str(toy_file)).documents() if d.split == part] for part in ("train", "test"))
    )
    assert figures["counting"] == counted and text.count(f"{counted:.3f}") >= 3, "counting stands in every table"
    assert (
        "ledger.svg" in text and "without values" in text and (tmp_path / "ledger.svg").read_text().startswith("<svg")
    )
    made = {path: path.stat().st_mtime_ns for path in (home / "lab" / "ledger").iterdir()}
    code, again, err = nanoghost(*words)
    assert code == 0 and json.loads(again) == figures
    assert made == {path: path.stat().st_mtime_ns for path in (home / "lab" / "ledger").iterdir()}
    code, out, err = nanoghost(*words, "--steps", 12, "--depth", 3, "--out", tmp_path / "again.md")
    assert code == 0, err
    assert (
        "without values" in (tmp_path / "again.svg").read_text()
        and "validation bpb" in (tmp_path / "again.md").read_text()
    )
    again = json.loads(out)["again"]
    assert list(again) == ["today", "without values", "growing batch"]
    assert again["today"]["more_bpb"] == {"mean": 0, "spread": 0} and again["without values"]["more_bpb"]["mean"] != 0
    code, _, err = nanoghost(*words, "--rungs", "nonsense")
    assert code == 2 and "nonsense" in err
    code, _, err = nanoghost(*words, "--depth", 3)
    assert code == 2 and "--steps" in err
    code, out, err = nanoghost(*words, "--rungs", "values", "--force")
    again = json.loads(out)["left_out"]["without values"]["bpb"]
    assert code == 0 and again == figures["left_out"]["without values"]["bpb"] and "timing without values" in err


def test_the_dial_is_measured_among_its_neighbours(nanoghost, toy_file, home, monkeypatch):
    for module in (pretrain, depth_sweep):
        monkeypatch.setattr(module, "example_texts", list)
    words = ("lab", "dial", "--data", toy_file, "--minutes", "0.03", "--choices", "1x320", "--json")
    code, out, err = nanoghost(*words)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [(r["depth"], r["vocabulary"], r["dial"]) for r in rows] == [(1, 320, False), (2, 4096, True)]
    assert min(r["from_best"] for r in rows) == 0 and all(r["steps"] >= 1 for r in rows)
    assert rows[0]["steps"] > rows[1]["steps"], "in the same time the smaller one makes more steps"
    assert not list((home / "models").glob("dial-*")), "only figures are kept"
    assert nanoghost(*words)[1] == out, "what was run is not run again"
    code, _, err = nanoghost("lab", "dial", "--choices", "4")
    assert code == 2 and "--choices" in err
