"""Models that come and go: GGUF and Hugging Face folders in and out, and the chat templates that come with them."""

import json
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import numpy as np
import pytest
import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, write_lock
from nanoghost.model.llama import Llama, LlamaConfig
from nanoghost.model.rope import kind_of
from nanoghost.tokenizer.chat_format import following, parse_reply, render
from nanoghost.tokenizer import jinja_template
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": " Hello <|im_end|> there"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The king sees the sea."},
]


@pytest.fixture
def tokenizer():
    t = Tokenizer.train([toy_text()], 400)
    t.dialect = jinja_template.Dialect(TEMPLATE, {"eos_token": "<|im_end|>"}, {t.special("<|im_end|>")})
    return t


def test_what_people_type_is_never_a_mark(tokenizer):
    ids, _ = render(TALK, tokenizer)
    end = tokenizer.special("<|im_end|>")
    assert ids.count(end) == 5  # one for the system text that the template adds, one for each message
    assert tokenizer.decode(ids, skip_special=False) == jinja_template.render_text(TEMPLATE, TALK)


def test_answers_are_learned_with_their_end_and_nothing_else(tokenizer):
    ids, learned = render(TALK, tokenizer)
    answers = tokenizer.decode([i for i, x in zip(ids, learned) if x], skip_special=False)
    assert answers == "Good day.<|im_end|>The king sees the sea.<|im_end|>"
    prompt, _ = render(TALK[:3], tokenizer, generation=True)
    assert ids[: len(prompt)] == prompt and learned[len(prompt)]


def test_a_template_that_refuses_is_a_users_mistake(tokenizer):
    tokenizer.dialect = replace(tokenizer.dialect, source="{{ raise_exception('no system text') }}")
    with pytest.raises(UserError, match="no system text"):
        render(TALK, tokenizer)
    tokenizer.dialect = replace(tokenizer.dialect, source="{{ ''.__class__.__mro__ }}")  # the sandbox holds
    with pytest.raises(UserError):
        render(TALK, tokenizer)


def test_calls_come_back_as_they_were_written(tokenizer):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "1+2"}'},
    }
    messages = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "3"}
    ids, learned = render(messages, tokenizer)
    written = [i for i, x in zip(ids, learned) if x]
    assert parse_reply(written, tokenizer)["tool_calls"] == [call]
    goes_on = render([*messages, answer], tokenizer, generation=True)[0]
    last = len(ids) - 1 - ids[::-1].index(tokenizer.special("<|im_end|>"))
    assert ids[: last + 1] + following([answer], tokenizer) == goes_on


# ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS = {
    "llama": {},
    "llama, tied, long": {"tied": True, "rope_scaling": LLAMA3, "rope_base": 500000.0},
    "qwen2": {"model_type": "qwen2", "biases": "qkv"},
    "qwen3": {"model_type": "qwen3", "norm_qk": True, "head_dim": 24, "tied": True},
}


def with_noise(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture(params=CONFIGS)
def folder(request, toy_llama):
    """A finished model folder of one of the family, with random weights."""
    home_folder = ModelFolder(toy_llama)
    tokenizer = Tokenizer.load(home_folder.path)
    torch.manual_seed(0)
    config = LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96, **CONFIGS[request.param])
    model = with_noise(Llama(config))
    settings = json.loads((home_folder.path / "config.json").read_text())
    (home_folder.path / "config.json").write_text(json.dumps(settings | model.settings()))
    tensors = {n: t.detach().clone().contiguous() for n, t in model.exported_tensors().items()}
    safetensors.torch.save_file(tensors, home_folder.path / "model.safetensors", {"format": "pt"})
    home_folder.write_card(replace(home_folder.card, arch=config.model_type))
    return home_folder


@pytest.fixture
def toy_llama(nanoghost, toy_file):
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--arch", "llama", "--steps", 1, "--depth", 2,
                             "--context", 64, "--batch", 2, "--vocab-size", 320)  # fmt: skip
    assert code == 0, err
    return "toy"


def logits(path):
    model, tokenizer = load_model(path, torch.float32)
    ids = torch.tensor([tokenizer.encode("The king sees the sea.")])
    with torch.no_grad():
        return model(ids), tokenizer


def test_out_as_gguf_and_in_again_is_the_same_model(nanoghost, folder, tmp_path):
    path = tmp_path / "toy.gguf"
    code, _, err = nanoghost("export", folder.name, "--quant", "f32", "--out", path)
    assert code == 0, err
    code, _, err = nanoghost("adopt", path, "--name", "again")
    assert code == 0, err
    before, own = logits(folder.path)
    after, theirs = logits(ModelFolder("again").path)
    assert torch.equal(before, after)
    assert render(TALK, own) == render(TALK, theirs)
    assert own.ends >= theirs.ends


@pytest.mark.parametrize(
    ("quant", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 3e-2), ("q4_1", 0.4), ("q4_0", 0.5)]
)
def test_quantised_exports_stay_near(nanoghost, folder, tmp_path, quant, most):
    path = tmp_path / "toy.gguf"
    assert nanoghost("export", folder.name, "--quant", quant, "--out", path)[0] == 0
    assert nanoghost("adopt", path, "--name", "again")[0] == 0
    before, after = logits(folder.path)[0], logits(ModelFolder("again").path)[0]
    assert (after - before).norm() < most * before.norm()


def test_a_folder_of_one_file_or_of_many_is_adopted(nanoghost, folder, tmp_path):
    tensors = safetensors.torch.load_file(folder.path / "model.safetensors")
    source = tmp_path / "theirs"
    source.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((folder.path / name).read_text())
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        safetensors.torch.save_file({n: tensors[n] for n in names[i::2]}, source / f"part-{i}.safetensors")
        weight_map |= {n: f"part-{i}.safetensors" for n in names[i::2]}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code, _, err = nanoghost("adopt", source, "--name", "again")
    assert code == 0, err
    assert torch.equal(logits(folder.path)[0], logits(ModelFolder("again").path)[0])
    (source / "part-1.safetensors").unlink()
    code, _, err = nanoghost("adopt", source, "--name", "third")
    assert code == 2 and "part-1" in err and not ModelFolder("third").path.exists()


def test_what_cannot_be_represented_is_refused(nanoghost, folder, tmp_path):
    settings = json.loads((folder.path / "config.json").read_text())
    for change, hint in (
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "MLP"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"num_hidden_layers": 3}, "lacks the tensor"),
        ({"num_hidden_layers": 1}, "does not have"),
        ({"intermediate_size": 97}, "97"),
    ):
        (folder.path / "config.json").write_text(json.dumps(settings | change))
        code, _, err = nanoghost("adopt", folder.path, "--name", "strange")
        assert code == 2 and hint in err, (change, err)
        assert not ModelFolder("strange").path.exists()
    assert not list(folder.path.parent.glob(".adopting*"))


def test_a_ghost_is_not_exported(nanoghost, toy_base, tmp_path):
    code, _, err = nanoghost("export", toy_base, "--out", tmp_path / "ghost.gguf")
    assert code == 2 and "--arch llama" in err and not list(tmp_path.glob("*.gguf"))


def copied(folder, to):
    """What Hugging Face's form has of a model folder."""
    to.mkdir()
    for name in "config.json generation_config.json tokenizer.json tokenizer_config.json model.safetensors".split():
        (to / name).write_bytes((folder.path / name).read_bytes())
    return to


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_licenses_travel(nanoghost, folder, tmp_path):
    source = copied(folder, tmp_path / "theirs")
    (source / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\nlicense: mine\n")
    (source / "LICENSE").write_text("their license")
    assert nanoghost("adopt", source, "--name", "again")[0] == 0
    card = ModelFolder("again").card
    assert card.data[0]["license"] == "apache-2.0" and "changes" in card.data[0]
    assert (ModelFolder("again").path / "LICENSE").read_text() == "their license"
    code, _, err = nanoghost("export", "again", "--gguf", "--quant", "q8_0", "--out", tmp_path / "out" / "a.gguf")
    assert code == 2 and "out" in err  # no such folder
    assert nanoghost("export", "again", "--gguf", "--quant", "q8_0", "--out", tmp_path / "a.gguf")[0] == 0
    fields = GGUFFile(tmp_path / "a.gguf").fields
    assert fields["general.license"] == "apache-2.0" and "Q8_0" in fields["general.description"]
    assert (tmp_path / "a.LICENSE").read_text() == "their license"
    assert nanoghost("adopt", tmp_path / "a.gguf", "--name", "third")[0] == 0
    assert ModelFolder("third").card.data[0]["license"] == "apache-2.0"
    assert (ModelFolder("third").path / "LICENSE").read_text() == "their license"


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_model_is_replaced_or_stays(nanoghost, folder, tmp_path, monkeypatch):
    source = copied(folder, tmp_path / "theirs")
    assert nanoghost("adopt", source, "--name", "again")[0] == 0
    place = ModelFolder("again").path
    (place / "note").touch()
    code, _, err = nanoghost("adopt", source, "--name", "again")
    assert code == 2 and "--force" in err
    with write_lock(ModelFolder("again")):
        code, _, err = nanoghost("adopt", source, "--name", "again", "--force")
    assert code == 2 and "another process" in err and (place / "note").exists()

    rename = type(place).rename

    def full(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as m:
        m.setattr(type(place), "rename", full)
        assert nanoghost("adopt", source, "--name", "again", "--force")[0] == 2
    assert (place / "note").exists() and ModelFolder("again").finished
    assert nanoghost("adopt", source, "--name", "again", "--force")[0] == 0
    assert not (place / "note").exists() and ModelFolder("again").finished
    assert not list(place.parent.glob(".adopting*"))


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as its library asks for; serves `folder`."""

    commit = "0123456789" * 4

    def do_GET(self):
        path = urlsplit(self.path).path
        files = [p for p in sorted(self.server.folder.rglob("*")) if p.is_file()]
        names = {p.relative_to(self.server.folder).as_posix(): p for p in files}
        _, _, name = path.partition(f"/resolve/{self.commit}/")
        if not path.removeprefix("/api/models").startswith("/maker/tiny/"):
            return self.send_error(404)
        if "/revision/" in path:
            body = json.dumps({"id": "maker/tiny", "sha": self.commit, "siblings": [{"rfilename": n} for n in names]})
        elif "/tree/" in path:
            body = json.dumps(
                [{"type": "file", "path": n, "size": p.stat().st_size, "oid": n} for n, p in names.items()]
            )
        else:
            self.server.asked.add(name)
        body = names[name].read_bytes() if name else body.encode()
        self.send_response(200)
        for key, value in {"Content-Length": len(body), "ETag": f'"{name}"', "X-Repo-Commit": self.commit}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="huggingface_hub is not installed: the extra 'hub'"
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = tmp_path / "hub", set()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)
def test_a_model_of_the_hub(nanoghost, folder, hub):
    copied(folder, hub.folder)
    (hub.folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-1\n---\n")
    (hub.folder / "LICENSE.txt").write_text("their license")
    for needless in ("pytorch_model.bin", "model.onnx", "original/model.safetensors", "onnx/config.json"):
        (hub.folder / needless).parent.mkdir(exist_ok=True)
        (hub.folder / needless).write_text("large")
    code, _, err = nanoghost("adopt", "maker/tiny")
    assert code == 0, err
    assert torch.equal(logits(folder.path)[0], logits(ModelFolder("tiny").path)[0])
    about = ModelFolder("tiny").card.data[0]
    assert (about["name"], about["license"]) == ("maker/tiny", "tiny-1") and Hub.commit in about["attribution"]
    assert (ModelFolder("tiny").path / "LICENSE.txt").exists()
    assert not [name for name in hub.asked if "/" in name or "bin" in name or "onnx" in name]
    code, _, err = nanoghost("adopt", "maker/other")
    assert code == 2 and "'maker/other'" in err and not ModelFolder("other").path.exists()


def test_without_the_hubs_library_there_is_a_clear_line(nanoghost, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = nanoghost("adopt", "maker/tiny")
    assert code == 2 and "nanoghost[hub]" in err


def test_unpermute_inverts_permute():
    from nanoghost.formats.gguf_llama import permute, unpermute

    x = np.random.default_rng(0).standard_normal((12, 5))
    assert np.array_equal(unpermute(permute(x, 2), 2), x)
    assert not np.array_equal(permute(x, 2), x)
