"""What commands print on terminals of every kind: encodings that lack characters, terminals without escape codes."""

import os
import pty
import subprocess
import sys

import pytest

from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import random_llama_folder, toy_text

PROMPTS = (b"> ", b"> \x1b[0m")
COMMANDS = (("--help",), ("list",), ("list", "--json"), ("show", "toy"), ("chat", "--help"), ("nonsense", "né\u4f60"))


@pytest.fixture
def toy(home):
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    return random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 64, 1, 64, 1, 1, 64), tokenizer)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gb18030"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_encoding_of_the_output_ends_in_a_traceback(toy, home, command, encoding):
    environment = os.environ | {"NANOGHOST_HOME": str(home), "PYTHONIOENCODING": encoding, "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-m", "nanoghost", *command], capture_output=True, env=environment)
    assert done.returncode == (2 if command[0] == "nonsense" else 0), done.stderr
    assert b"Traceback" not in done.stderr
    assert done.stdout + done.stderr


def in_terminal(command: tuple, **environment: str) -> str:
    """What a command prints on a terminal."""
    terminal, process_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nanoghost", *command],
        stdin=process_end, stdout=process_end, stderr=process_end, env=os.environ | environment,
    )  # fmt: skip
    os.close(process_end)
    output = b""
    try:
        while block := os.read(terminal, 4096):
            output += block
            if output.endswith(PROMPTS):
                os.write(terminal, b"\x04")  # Ctrl-D, once the chat waits for a line
    except OSError:  # Linux reports the end of the process in this way
        pass
    process.wait()
    os.close(terminal)
    return output.decode()


@pytest.mark.parametrize(
    "environment", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}], ids=["dumb", "no color"]
)
@pytest.mark.parametrize("command", [("list",), ("show", "toy"), ("chat", "toy")], ids=" ".join)
def test_no_escape_codes_where_they_are_not_wanted(toy, home, command, environment):
    output = in_terminal(command, NANOGHOST_HOME=str(home), **environment)
    assert "toy" in output
    assert "\x1b" not in output


@pytest.mark.parametrize("command", [("list",), ("chat", "toy")], ids=" ".join)
def test_a_terminal_that_knows_escape_codes_gets_them(toy, home, command):
    """Otherwise the test above could not fail."""
    assert "\x1b[" in in_terminal(command, NANOGHOST_HOME=str(home), TERM="xterm-256color", NO_COLOR="")
