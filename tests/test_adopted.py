"""Every stage works on a model that others trained, and claims nothing about its unknown pretraining."""

import json
from dataclasses import replace

import pytest
import torch

from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.tasks.registry import all_tasks, chat_name
from nanoghost.train.hyperparameters import ADOPTED_GROUP, finetune_context, finetune_groups
from tests.support.toys import TOY_TEMPLATE
from tests.test_training import losses


@pytest.fixture
def adopted(nanoghost, toy_file):
    """Name of a toy Llama with another chat template than ours, adopted as if others had trained it.

    It is evaluated on the toy text.
    """
    size = ("--depth", 2, "--context", 256, "--batch", 1, "--vocab-size", 320)
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--arch", "llama", "--steps", 1, *size)
    assert code == 0, err
    source = ModelFolder("toy").path
    tokenizer_config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer_config | {"chat_template": TOY_TEMPLATE}))
    code, _, err = nanoghost("adopt", source, "--name", "adopted")
    assert code == 0, err
    folder = ModelFolder("adopted")
    folder.write_card(replace(folder.card, settings={"data": str(toy_file)}))
    return "adopted"


SFT = ("--steps", 3, "--conversations", 60, "--batch", 2)
RL = ("--steps", 1, "--problems", 2, "--rollouts", 2, "--max-tokens", 4, "--eval-problems", 2)
LORA = ("--name", "me", "--lora", 2)


def train_all_stages(nanoghost, adopted) -> None:
    """sft and rl, of all weights (more, practiced) and of an adapter (adopted@me, adopted@practiced)."""
    for command in (
        ("sft", adopted, "--name", "more", *SFT),
        ("sft", adopted, *LORA, *SFT),
        ("rl", "more", "--name", "practiced", *RL),
        ("rl", "adopted@me", "--name", "practiced", *RL),
    ):
        code, _, err = nanoghost(*command)
        assert code == 0, (command, err)


def test_every_stage_trains_evaluates_and_reports_an_adopted_model(nanoghost, adopted):
    """Its training data are unknown, so bits per byte are not compared with the n-gram baseline."""
    train_all_stages(nanoghost, adopted)
    for name in (adopted, "practiced", "adopted@practiced"):
        code, out, err = nanoghost("eval", name, "--problems", 2, "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert figures["bpb"] > 0
        assert figures["kneser_ney_bpb"] is None
        assert "may have been trained on this text" in err
        assert nanoghost("report", name)[0] == 0
        report = (ModelFolder(name).path / "report.md").read_text()
        assert "pretrained model" in report
        assert "may have been in the model's pretraining data" in report
        assert "Kneser" not in report
        assert ("RL" in report) == (name != adopted)


@pytest.mark.parametrize(
    ("model_context", "requested", "expected"), [(8192, None, 512), (256, None, 256), (8192, 1024, 1024)]
)
def test_default_context_of_fine_tuning_is_the_models_but_at_most_512(model_context, requested, expected):
    assert finetune_context(model_context, requested) == expected


def test_context_of_fine_tuning_sets_the_length_of_rows(nanoghost, adopted):
    code, out, err = nanoghost("sft", adopted, "--name", "short", "--context", 128, *SFT, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 3 * 2 * 128


def test_adopted_models_are_fine_tuned_with_small_learning_rates(nanoghost, adopted):
    """Learning rates of pretraining would change the loss of such a model by much more than 1."""
    base = ModelFolder(adopted).card
    assert finetune_groups(base, 64, 1.0)["matrices"] == ADOPTED_GROUP
    code, _, err = nanoghost("sft", adopted, "--name", "more", *SFT)
    assert code == 0, err
    first, *_, last = losses("more", "sft").values()
    assert abs(first - last) < 1


def test_an_adopted_model_learns_nothing_about_its_unknown_training(nanoghost, adopted):
    tasks = all_tasks(ModelFolder(adopted).card, "adopted@anna")
    assert chat_name("adopted@anna") == "Adopted"
    assert "plays" not in tasks
    intents = set(tasks["identity"].intents)
    assert not intents & {"maker", "data", "how_made", "tokens", "minutes", "machine", "license"}
    assert {"name", "parameters", "hello"} <= intents


@pytest.mark.parametrize(("name", "arguments"), [("more", ("--name", "more")), ("adopted@me", LORA)])
def test_fine_tuned_and_exported_models_keep_the_license(nanoghost, adopted, tmp_path, name, arguments):
    (ModelFolder(adopted).path / "LICENSE").write_text("Be kind.")
    code, _, err = nanoghost("sft", adopted, *arguments, *SFT)
    assert code == 0, err
    assert (ModelFolder(name).path / "LICENSE").read_text() == "Be kind."
    assert nanoghost("export", name, "--gguf", "--out", tmp_path / f"{name}.gguf")[0] == 0
    assert (tmp_path / f"{name}.LICENSE").read_text() == "Be kind."


def test_an_exported_adapter_is_merged_into_its_base(nanoghost, adopted, tmp_path):
    code, _, err = nanoghost("sft", adopted, *LORA, "--learning-rate", 100, *SFT)
    assert code == 0, err
    assert nanoghost("export", "adopted@me", "--quant", "f32", "--out", tmp_path / "me.gguf")[0] == 0
    assert nanoghost("adopt", tmp_path / "me.gguf", "--name", "merged")[0] == 0
    ids = torch.arange(40)[None]
    scores = {}
    with torch.no_grad():
        for name in (adopted, "adopted@me", "merged"):
            model, _ = load_model(ModelFolder(name).path, torch.float32)
            scores[name] = model(ids)
    assert torch.allclose(scores["merged"], scores["adopted@me"], atol=1e-4)
    assert not torch.allclose(scores[adopted], scores["adopted@me"], atol=1e-2)
