"""A run is bound to the content of what it learns from: with other content it is not resumed, nor called finished."""

import hashlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from nanoghost import home as home_module
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.home import ModelFolder, cached_sha256, home, write_json
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train import distill, pretrain, rl, sft
from nanoghost.train import run as run_module
from tests.support.toys import TOY_FLAGS, add_noise, random_llama_folder, toy_text

STAGES = {
    "pretrain": ("--data", "notes.txt", "--steps", 3, *TOY_FLAGS),
    "sft": ("toy", "--data", "chats.jsonl", "--steps", 3, "--batch", 2),
    "distill": ("toy", "--teacher", "teacher", "--kind", "token", "--data", "chats.jsonl", "--steps", 3),
    "rl": ("toy", "--tasks", "chain_sum", "--data", "chats.jsonl", "--steps", 1, "--problems", 1, "--rollouts", 2,
           "--max-tokens", 4, "--eval-problems", 2),
}  # fmt: skip
INTERRUPTED_FUNCTIONS = {pretrain: "plan_run", sft: "load_parent", distill: "load_parent", rl: "load_parent"}


@pytest.fixture
def workplace(tmp_path, monkeypatch, toy_file):
    """A folder with notes.txt and chats.jsonl, a model 'toy' and a 'teacher' with the same tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_chats("The king sees.")
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    for name in ("toy", "teacher"):
        folder = random_llama_folder(name, LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64), tokenizer)
        folder.write_card(replace(folder.card, stage="adopt"))
    return tmp_path


def write_chats(answer: str) -> None:
    turn = [{"role": "user", "content": "king?"}, {"role": "assistant", "content": answer}]
    with open("chats.jsonl", "w") as file:
        file.writelines(json.dumps({"messages": turn}) + "\n" for _ in range(20))


def interrupted(nanoghost, monkeypatch, *words) -> None:
    """Run a stage that gets Ctrl-C after its folder was created, and before its first step."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module, function in INTERRUPTED_FUNCTIONS.items():
            patch.setattr(module, function, interrupt)
        assert nanoghost(*words)[0] == 130


def contents(folder) -> dict[str, bytes]:
    """All files but the cache of checksums."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "sha256.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def change_notes() -> None:
    with open("notes.txt", "w") as file:
        file.write(toy_text(seed=1))


def change_weights(name: str) -> None:
    path = ModelFolder(name).path
    model, tokenizer = load_model(path, torch.float32)
    save_model(path, add_noise(model), tokenizer)


CHANGES = [
    ("pretrain", change_notes, "data 'notes.txt'"),
    ("sft", partial(write_chats, "The queen sees."), "data 'chats.jsonl'"),
    ("sft", partial(change_weights, "toy"), "parent 'toy'"),
    ("rl", partial(write_chats, "The queen sees."), "data 'chats.jsonl'"),
    ("rl", partial(change_weights, "toy"), "parent 'toy'"),
    ("distill", partial(write_chats, "The queen sees."), "data 'chats.jsonl'"),
    ("distill", partial(change_weights, "toy"), "parent 'toy'"),
    ("distill", partial(change_weights, "teacher"), "teacher 'teacher'"),
]


@pytest.mark.parametrize("state", ["unfinished", "finished"])
@pytest.mark.parametrize("stage, change, name", CHANGES, ids=[f"{stage}-{name}" for stage, _, name in CHANGES])
def test_a_run_whose_inputs_have_changed_stops_and_names_them(
    nanoghost, workplace, monkeypatch, stage, change, name, state
):
    command = (stage, "--name", "new", *STAGES[stage])
    if state == "finished":
        assert nanoghost(*command)[0] == 0
    else:
        interrupted(nanoghost, monkeypatch, *command)
    change()
    before = contents(home())
    code, _, err = nanoghost(*command)
    assert code == 2
    (line,) = err.strip().splitlines()
    for part in ("'new'", f"is {state}", name, "has changed", "put the old content back", "--force"):
        assert part in line
    assert contents(home()) == before, "nothing was learned or written"
    assert nanoghost(*command, "--force")[0] == 0


@pytest.mark.parametrize("stage", ["sft", "distill", "rl"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_mistake_in_the_data_leaves_everything_as_it_was(nanoghost, workplace, home, stage, exists):
    """With --force, too: a finished model was deleted before its new data turned out to be useless."""
    force = ()
    if exists:
        assert nanoghost(stage, *STAGES[stage], "--name", "new")[0] == 0
        force = ("--force",)
    before = contents(home / "models")
    question = {"role": "user", "content": "king?"}
    (workplace / "chats.jsonl").write_text(json.dumps({"messages": [question]}) + "\n")
    code, _, error = nanoghost(stage, *STAGES[stage], "--name", "new", *force)
    assert code == 2, error
    assert contents(home / "models") == before


def test_ctrl_c_before_the_first_step_does_not_replace_a_model(nanoghost, workplace, monkeypatch, home):
    command = ("sft", *STAGES["sft"], "--name", "new")
    assert nanoghost(*command)[0] == 0
    before = contents(home / "models")
    interrupted(nanoghost, monkeypatch, *command, "--force")
    assert contents(home / "models") == before


def test_a_model_outlives_two_killed_attempts_to_replace_it(nanoghost, workplace, monkeypatch, home):
    """A killed process cannot bring it back; the next command that ends with an error does."""
    command = ("sft", *STAGES["sft"], "--name", "new")
    assert nanoghost(*command)[0] == 0
    before = contents(home / "models")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "undo", lambda folder: None)
        for _ in range(2):
            interrupted(nanoghost, monkeypatch, *command, "--force")
    assert contents(home / "models") != before
    (workplace / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "king?"}]}) + "\n")
    assert nanoghost(*command, "--force")[0] == 2
    assert contents(home / "models") == before


def test_a_run_resumes_when_the_old_text_is_back(nanoghost, workplace, monkeypatch):
    command = ("pretrain", "--name", "new", *STAGES["pretrain"])
    interrupted(nanoghost, monkeypatch, *command)
    text = (workplace / "notes.txt").read_text()
    change_notes()
    assert nanoghost(*command)[0] == 2
    (workplace / "notes.txt").write_text(text)
    assert nanoghost(*command)[0] == 0
    assert ModelFolder("new").is_finished


def test_distilling_from_changed_text_stops_before_the_text_is_tokenized(nanoghost, workplace, monkeypatch):
    command = ("distill", *STAGES["distill"], "--name", "new", "--data", "notes.txt", "--context", 64)
    interrupted(nanoghost, monkeypatch, *command)
    change_notes()
    monkeypatch.setattr(distill, "tokenize_source", None)  # calling it would fail
    code, _, err = nanoghost(*command)
    assert code == 2 and "data 'notes.txt' has changed" in err


def test_another_tokenizer_under_the_same_name_stops_the_run(nanoghost, workplace, monkeypatch):
    command = ("pretrain", "--name", "new", *STAGES["pretrain"], "--tokenizer", "teacher")
    interrupted(nanoghost, monkeypatch, *command)
    flags = ("--data", "other.txt", "--steps", 2, *TOY_FLAGS, "--force")
    (workplace / "other.txt").write_text(toy_text(seed=2).replace("king", "emperor"))
    assert nanoghost("pretrain", "--name", "teacher", *flags)[0] == 0
    code, _, err = nanoghost(*command)
    assert code == 2 and "tokenizer 'teacher' has changed" in err


def test_a_parent_with_the_same_weights_is_the_same_parent(nanoghost, workplace, monkeypatch):
    """Its events and its card, and writing the same weights again, do not change it."""
    command = ("sft", "--name", "new", *STAGES["sft"])
    interrupted(nanoghost, monkeypatch, *command)
    toy = ModelFolder("toy")
    toy.append_event({"stage": "adopt-eval", "step": 0})
    toy.write_card(replace(toy.card, finished=2.0))
    save_model(toy.path, *load_model(toy.path, torch.float32))
    assert nanoghost(*command)[0] == 0


def test_the_fingerprint_of_an_adapter_covers_its_base(home):
    base, adapter = ModelFolder("base"), ModelFolder("base@new")
    for folder, file in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        write_json(folder.path / file, 1)
        write_json(folder.path / "card.json", 1)
    fingerprints = {adapter.fingerprint}
    write_json(adapter.path / "card.json", 2)
    assert adapter.fingerprint in fingerprints, "the card is not part of the model"
    write_json(adapter.path / "adapter_model.safetensors", 2)
    fingerprints.add(adapter.fingerprint)
    write_json(base.path / "model.safetensors", 2)
    fingerprints.add(adapter.fingerprint)
    assert len(fingerprints) == 3


def test_the_checksum_of_a_file_is_computed_once_for_each_content(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert cached_sha256(file) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(home_module.hashlib, "file_digest", None)  # calling it would fail
        assert cached_sha256(file) == hashlib.sha256(b"one").hexdigest()
    file.unlink()
    file.write_bytes(b"two")
    assert cached_sha256(file) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_shows_its_report_and_its_figures(nanoghost, workplace, stage):
    command = (stage, "--name", "new", *STAGES[stage], "--json")
    code, figures, _ = nanoghost(*command)
    assert code == 0
    before = contents(home())
    code, figures_again, err = nanoghost(*command)
    assert code == 0 and json.loads(figures_again) == json.loads(figures)
    assert "new is finished" in err
    assert "\nnew: " in err, "the headline of the report"
    assert contents(home()) == before


def test_a_finished_model_is_shown_without_naming_its_parent(nanoghost, workplace):
    """The parent is that of the model, although another model, or this one, was finished last."""
    _, *flags = STAGES["sft"]
    assert nanoghost("sft", *flags, "--name", "new")[0] == 0
    assert nanoghost("sft", *flags, "--name", "new")[0] == 0
    assert ModelFolder("new").card.parent.name in ("toy", "teacher")
