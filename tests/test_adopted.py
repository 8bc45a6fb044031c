"""Every stage works on a model that others trained, and nothing is said of its pretraining that nobody here knows."""

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
    """A toy Llama with another template than ours, taken in as if others had made it; it is examined on the toy text."""
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--arch", "llama", "--steps", 1, "--depth", 2,
                             "--context", 256, "--batch", 1, "--vocab-size", 320)  # fmt: skip
    assert code == 0, err
    source = ModelFolder("toy").path
    said = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": TOY_TEMPLATE}))
    code, _, err = nanoghost("adopt", source, "--name", "theirs")
    assert code == 0, err
    folder = ModelFolder("theirs")
    folder.write_card(replace(folder.card, settings={"data": str(toy_file)}))
    return "theirs"


SFT = ("--steps", 3, "--conversations", 60, "--batch", 2)
RL = ("--steps", 1, "--problems", 2, "--rollouts", 2, "--max-tokens", 4, "--eval-problems", 2)


def test_every_stage_and_its_report(nanoghost, adopted):
    for words in (
        ("sft", adopted, "--name", "more", *SFT),
        ("sft", adopted, "--name", "me", "--lora", 2, *SFT),
        ("rl", "more", "--name", "practised", *RL),
        ("rl", "theirs@me", "--name", "practised", *RL),
    ):
        code, _, err = nanoghost(*words)
        assert code == 0, (words, err)
    for name in (adopted, "practised", "theirs@practised"):
        code, out, err = nanoghost("eval", name, "--problems", 2, "--json")
        assert code == 0, err
        figures = json.loads(out)
        assert figures["bpb"] > 0 and figures["kneser_ney_bpb"] is None and "makers" in err
        assert nanoghost("report", name)[0] == 0
        text = (ModelFolder(name).path / "report.md").read_text()
        assert "pretrained model" in text and "may have been in the model's pretraining data" in text and "Kneser" not in text
        assert ("RL" in text) == (name != adopted)


def test_rows_are_no_longer_than_is_sensible(nanoghost, adopted):
    assert finetune_context(8192) == 512 and finetune_context(256) == 256 and finetune_context(8192, 1024) == 1024
    code, out, err = nanoghost("sft", adopted, "--name", "short", "--context", 128, *SFT, "--json")
    assert code == 0, err
    assert json.loads(out)["tokens"] == 3 * 2 * 128


def test_it_takes_small_steps(nanoghost, adopted):
    base = ModelFolder(adopted).card
    assert finetune_groups(base, 64, 1.0)["matrices"] == ADOPTED_GROUP
    code, _, err = nanoghost("sft", adopted, "--name", "more", *SFT)
    assert code == 0, err
    first, *_, last = losses("more", "sft").values()
    assert abs(first - last) < 1, "steps of pretraining's size would have changed much more"


def test_it_says_nothing_of_its_making(nanoghost, adopted):
    tasks = all_tasks(ModelFolder(adopted).card, "theirs@anna")
    assert chat_name("theirs@anna") == "Theirs" and "plays" not in tasks
    assert not {"maker", "data", "how_made", "tokens", "minutes", "machine", "licence"} & set(tasks["identity"].intents)
    assert {"name", "parameters", "hello"} <= set(tasks["identity"].intents)


def test_its_licence_goes_on_to_what_is_made_from_it(nanoghost, adopted, tmp_path):
    (ModelFolder(adopted).path / "LICENSE").write_text("Be kind.")
    for words in (("--name", "more"), ("--name", "me", "--lora", 2)):
        code, _, err = nanoghost("sft", adopted, *words, *SFT)
        assert code == 0, err
    for name in ("more", "theirs@me"):
        assert (ModelFolder(name).path / "LICENSE").read_text() == "Be kind."
        assert nanoghost("export", name, "--gguf", "--out", tmp_path / f"{name}.gguf")[0] == 0
        assert (tmp_path / f"{name}.LICENSE").read_text() == "Be kind."


def test_an_adapter_is_exported_with_its_base(nanoghost, adopted, tmp_path):
    code, _, err = nanoghost("sft", adopted, "--name", "me", "--lora", 2, "--learning-rate", 100, *SFT)
    assert code == 0, err
    assert nanoghost("export", "theirs@me", "--quant", "f32", "--out", tmp_path / "me.gguf")[0] == 0
    assert nanoghost("adopt", tmp_path / "me.gguf", "--name", "back")[0] == 0
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base, adapted, back = (
            load_model(ModelFolder(name).path, torch.float32)[0](ids) for name in (adopted, "theirs@me", "back")
        )
    assert torch.allclose(back, adapted, atol=1e-4) and not torch.allclose(base, adapted, atol=1e-2)
