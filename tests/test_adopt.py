"""adopt and export: GGUF files and Hugging Face folders in and out, licenses, replacement of a model, the Hub."""

import json
import shutil
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import safetensors.torch
import torch

from nanoghost.formats.gguf_llama import permute, unpermute
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_model, load_tokenizer
from nanoghost.home import ModelFolder, write_lock
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.hub_server import COMMIT, HubServer
from tests.support.toys import CONVERSATION, GRANITE_MULTIPLIERS, LLAMA3_SCALING, random_llama_folder, toy_text

CONFIGS = {
    "llama": {},
    "llama, tied, long": {"tied_embeddings": True, "rope_scaling": LLAMA3_SCALING, "rope_base": 500000.0},
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "granite": {"model_type": "granite", **GRANITE_MULTIPLIERS},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_width": 24, "tied_embeddings": True},
}
HUGGINGFACE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text()], 320)


def toy_model(kind: str, tokenizer: Tokenizer) -> ModelFolder:
    config = LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96, **CONFIGS[kind])
    return random_llama_folder("toy", config, tokenizer)


@pytest.fixture(params=CONFIGS)
def folder(request, tokenizer):
    """A finished model of each member of the family, with random weights."""
    return toy_model(request.param, tokenizer)


@pytest.fixture
def qwen3_folder(tokenizer):
    return toy_model("qwen3", tokenizer)


def copy_huggingface_files(folder: ModelFolder, target: Path) -> Path:
    """The files that a model folder of Hugging Face transformers has."""
    target.mkdir()
    for name in HUGGINGFACE_FILES:
        shutil.copy(folder.path / name, target)
    return target


@torch.no_grad()
def logits(folder: ModelFolder) -> torch.Tensor:
    model, tokenizer = load_model(folder.path, torch.float32)
    return model(torch.tensor([tokenizer.encode("The king sees the sea.")]))


# ── export and adopt ────────────────────────────────────────────────────────────────────────────────────────────────


def test_exported_f32_gguf_is_adopted_as_the_same_model(nanoghost, folder, tmp_path):
    path = tmp_path / "toy.gguf"
    code, _, err = nanoghost("export", folder.name, "--quant", "f32", "--out", path)
    assert code == 0, err
    code, _, err = nanoghost("adopt", path, "--name", "again")
    assert code == 0, err
    adopted = ModelFolder("again")
    assert torch.equal(logits(folder), logits(adopted))
    before, after = load_tokenizer(folder.path), load_tokenizer(adopted.path)
    assert render(CONVERSATION, before) == render(CONVERSATION, after)
    assert before.stop_ids == after.stop_ids


@pytest.mark.parametrize(
    ("quant", "bound"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2), ("q4_1", 0.4), ("q4_0", 0.5)]
)
def test_logits_of_quantized_exports_stay_within_bounds(nanoghost, folder, tmp_path, quant, bound):
    path = tmp_path / "toy.gguf"
    assert nanoghost("export", folder.name, "--quant", quant, "--out", path)[0] == 0
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    before, after = logits(folder), logits(ModelFolder("again"))
    assert (after - before).norm() < bound * before.norm()


def test_unpermute_inverts_permute():
    x = np.random.default_rng(0).standard_normal((12, 5))
    assert np.array_equal(unpermute(permute(x, 2), 2), x)
    assert not np.array_equal(permute(x, 2), x)


def test_export_of_a_ghost_is_refused(nanoghost, toy_base, tmp_path):
    """No other engine can run a ghost; the error names the architecture that can be exported."""
    code, _, err = nanoghost("export", toy_base, "--out", tmp_path / "ghost.gguf")
    assert code == 2
    assert "--arch llama" in err
    assert not list(tmp_path.glob("*.gguf"))


# ── Hugging Face folders ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sharded_source(folder, tmp_path):
    """A Hugging Face folder whose weights are in two files with an index."""
    source = copy_huggingface_files(folder, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        file = f"part-{part}.safetensors"
        names = sorted(tensors)[part::2]
        safetensors.torch.save_file({name: tensors[name] for name in names}, source / file)
        weight_map |= dict.fromkeys(names, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


def test_adopts_weights_in_several_files(nanoghost, folder, sharded_source):
    code, _, err = nanoghost("adopt", sharded_source, "--name", "again")
    assert code == 0, err
    assert torch.equal(logits(folder), logits(ModelFolder("again")))


def test_a_missing_weight_file_is_named(nanoghost, sharded_source):
    (sharded_source / "part-1.safetensors").unlink()
    code, _, err = nanoghost("adopt", sharded_source, "--name", "again")
    assert code == 2
    assert "part-1" in err
    assert not ModelFolder("again").path.exists()


def test_a_whole_file_counts_and_not_the_index_of_an_earlier_version(nanoghost, folder, tmp_path):
    source = copy_huggingface_files(folder, tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"norm.weight": "gone.safetensors"}})
    )
    code, _, err = nanoghost("adopt", source, "--name", "again")
    assert code == 0, err
    assert torch.equal(logits(folder), logits(ModelFolder("again")))


def test_a_head_of_its_own_is_kept_whatever_the_config_says_of_tied_weights(nanoghost, qwen3_folder, tmp_path):
    """As transformers reads it: files that hold another matrix than the embedding come from a training that untied."""
    source = copy_huggingface_files(qwen3_folder, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = torch.randn_like(embedding.float()).to(embedding.dtype)
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    assert nanoghost("adopt", source, "--name", "untied")[0] == 0
    model, _ = load_model(ModelFolder("untied").path, torch.float32)
    assert torch.equal(model.lm_head.weight, head.float())
    assert torch.equal(model.embedding.weight, embedding.float())


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "MLP"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"num_hidden_layers": 3}, "lacks the tensor"),
        ({"num_hidden_layers": 1}, "does not have"),
        ({"intermediate_size": 97}, "97"),
    ],
)
def test_unsupported_or_contradictory_configs_are_refused(nanoghost, folder, change, hint):
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(config | change))
    code, _, err = nanoghost("adopt", folder.path, "--name", "strange")
    assert code == 2
    assert hint in err
    assert not ModelFolder("strange").path.exists()
    assert not list(folder.path.parent.glob(".adopting*"))


# ── licenses ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def licensed_model(nanoghost, qwen3_folder, tmp_path):
    """A model adopted from a folder with a license file and a license name in its README."""
    source = copy_huggingface_files(qwen3_folder, tmp_path / "source")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\nlicense: mine\n")
    (source / "LICENSE").write_text("text of the license")
    code, _, err = nanoghost("adopt", source, "--name", "licensed")
    assert code == 0, err
    return ModelFolder("licensed")


def test_adopted_folder_keeps_its_license(licensed_model):
    [entry] = licensed_model.card.data
    assert entry["license"] == "apache-2.0"
    assert "changes" in entry
    assert (licensed_model.path / "LICENSE").read_text() == "text of the license"


def test_exported_gguf_keeps_the_license_and_names_the_changes(nanoghost, licensed_model, tmp_path):
    path = tmp_path / "a.gguf"
    code, _, err = nanoghost("export", licensed_model.name, "--gguf", "--quant", "q8_0", "--out", path)
    assert code == 0, err
    fields = GGUFFile(path).fields
    assert fields["general.license"] == "apache-2.0"
    assert "Q8_0" in fields["general.description"]
    assert (tmp_path / "a.LICENSE").read_text() == "text of the license"


def test_gguf_adopted_again_keeps_the_license(nanoghost, licensed_model, tmp_path):
    path = tmp_path / "a.gguf"
    assert nanoghost("export", licensed_model.name, "--gguf", "--quant", "q8_0", "--out", path)[0] == 0
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    again = ModelFolder("again")
    assert again.card.data[0]["license"] == "apache-2.0"
    assert (again.path / "LICENSE").read_text() == "text of the license"


def test_export_into_a_missing_folder_is_refused(nanoghost, licensed_model, tmp_path):
    code, _, err = nanoghost("export", licensed_model.name, "--out", tmp_path / "out" / "a.gguf")
    assert code == 2
    assert "out" in err


# ── replacing a model ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def source(qwen3_folder, tmp_path):
    return copy_huggingface_files(qwen3_folder, tmp_path / "source")


@pytest.fixture
def adopted(nanoghost, source):
    """A model adopted from `source`, with a file that marks this version of the folder."""
    assert nanoghost("adopt", source, "--name", "again")[0] == 0
    folder = ModelFolder("again")
    (folder.path / "marker").touch()
    return folder


def test_an_existing_model_is_only_replaced_with_force(nanoghost, source, adopted):
    code, _, err = nanoghost("adopt", source, "--name", "again")
    assert code == 2
    assert "--force" in err
    assert (adopted.path / "marker").exists()


def test_a_model_that_is_being_written_is_not_replaced(nanoghost, source, adopted):
    with write_lock(adopted):
        code, _, err = nanoghost("adopt", source, "--name", "again", "--force")
    assert code == 2
    assert "another process" in err
    assert (adopted.path / "marker").exists()


def test_the_old_model_returns_if_the_new_one_cannot_be_moved(nanoghost, source, adopted, monkeypatch):
    """The disk may fill up between the two renames."""
    rename = Path.rename

    def rename_on_full_disk(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(adopted.path), "rename", rename_on_full_disk)
    assert nanoghost("adopt", source, "--name", "again", "--force")[0] == 2
    assert (adopted.path / "marker").exists()
    assert adopted.is_finished


def test_force_replaces_the_model(nanoghost, source, adopted):
    assert nanoghost("adopt", source, "--name", "again", "--force")[0] == 0
    assert not (adopted.path / "marker").exists()
    assert adopted.is_finished
    assert not list(adopted.path.parent.glob(".adopting*"))


# ── the Hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed: the extra 'hub'"
    )
    server = HubServer(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub_model(qwen3_folder, hub):
    """A model on the Hub, with a license, and with large files in formats that nanoghost does not read."""
    copy_huggingface_files(qwen3_folder, hub.folder)
    (hub.folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\n---\n")
    (hub.folder / "LICENSE.txt").write_text("text of the license")
    for needless in ("pytorch_model.bin", "model.onnx", "original/model.safetensors", "onnx/config.json"):
        (hub.folder / needless).parent.mkdir(exist_ok=True)
        (hub.folder / needless).write_text("large")
    return qwen3_folder


def test_a_model_on_the_hub_is_adopted_with_its_license_and_commit(nanoghost, hub_model):
    code, _, err = nanoghost("adopt", "maker/tiny")
    assert code == 0, err
    adopted = ModelFolder("tiny")
    assert torch.equal(logits(hub_model), logits(adopted))
    [entry] = adopted.card.data
    assert entry["name"] == "maker/tiny"
    assert entry["license"] == "tiny-1"
    assert COMMIT in entry["attribution"]
    assert (adopted.path / "LICENSE.txt").exists()


def test_only_the_needed_files_are_downloaded_from_the_hub(nanoghost, hub_model, hub):
    assert nanoghost("adopt", "maker/tiny")[0] == 0
    assert "model.safetensors" in hub.requested_files
    assert not [name for name in hub.requested_files if "/" in name or "bin" in name or "onnx" in name]


def test_a_model_that_the_hub_does_not_have_is_named(nanoghost, hub_model):
    code, _, err = nanoghost("adopt", "maker/other")
    assert code == 2
    assert "'maker/other'" in err
    assert not ModelFolder("other").path.exists()


def test_without_huggingface_hub_the_error_names_the_extra(nanoghost, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = nanoghost("adopt", "maker/tiny")
    assert code == 2
    assert "nanoghost[hub]" in err


@pytest.mark.parametrize("source", ["no-such-file.gguf", "./no-such-folder"])
@pytest.mark.parametrize("name", [(), ("--name", "mine")])
def test_a_source_that_does_not_exist_is_named(nanoghost, source, name):
    code, _, err = nanoghost("adopt", source, *name)
    assert code == 2
    assert f"'{source}' is neither" in err
