"""SIGINT and SIGTERM: every command ends within two seconds, without a traceback, or says what it waits for."""

import signal
import subprocess
import sys
import time

import pytest

from nanoghost.home import ModelFolder
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import TOY_FLAGS, random_llama_folder, toy_text

LIMIT = 2.0  # seconds from the signal to the end of the process
ALLOWANCE = 3.0  # seconds in addition, for a machine with other work


def start_program(program: str, *words) -> subprocess.Popen:
    """Start Python with a program that prints READY to standard error when it is to be interrupted."""
    command = [sys.executable, "-c", program, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "READY" in line:
            return process
    raise AssertionError("the program ended before it was ready")


def stop(process: subprocess.Popen, signum: int) -> tuple[int, str, float]:
    """Send a signal to a process: (exit code, standard error, seconds until it ended)."""
    start = time.monotonic()
    process.send_signal(signum)
    err = process.communicate(timeout=60)[1]
    return process.returncode, err, time.monotonic() - start


# Words without an end would take hours: nothing but native code runs in the main thread.
LEARN_IN_NATIVE_CODE = """
import sys, threading
from nanoghost import cli
from nanoghost.tokenizer import tokenizer

tokenizer.MAX_TRAINING_WORD = 10**9
BpeTrainer = tokenizer.trainers.BpeTrainer

def slow_trainer(**options):
    threading.Timer(1.0, lambda: print("READY", file=sys.stderr, flush=True)).start()
    return BpeTrainer(**options)

tokenizer.trainers.BpeTrainer = slow_trainer
cli.main(sys.argv[1:])
"""

# The command sleeps after one of its functions: MODULE.FUNCTION and SECONDS are the first arguments.
SLEEP_AFTER = """
import importlib, sys, time
from nanoghost import cli

module, _, name = sys.argv[1].rpartition(".")
module = importlib.import_module(module)
function = getattr(module, name)

def slow(*arguments, **options):
    result = function(*arguments, **options)
    print("READY", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[2]))
    return result

setattr(module, name, slow)
cli.main(sys.argv[3:])
"""


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("words", [("tokenizer", "train", "--name", "new", "--data"), ("data",)], ids=" ".join)
def test_native_code_is_interrupted(tmp_path, home, signum, code, words):
    (tmp_path / "letters.txt").write_text("ab" * 2**20)
    process = start_program(LEARN_IN_NATIVE_CODE, *words, tmp_path / "letters.txt")
    exit_code, err, seconds = stop(process, signum)
    assert exit_code == code
    assert err.strip() == "nanoghost: stopped"
    assert seconds < LIMIT + ALLOWANCE
    assert not list(home.rglob("tokenizer.json")), "nothing is written"


@pytest.fixture
def toy(home):
    """Name of a model with random weights that every engine can run."""
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    return random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64), tokenizer).name


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "function, words",
    [
        ("train.pretrain.plan_run", ("pretrain", "--data", "notes.txt", "--name", "new", "--steps", 3, *TOY_FLAGS)),
        ("commands.data.tokenize_source", ("data", "notes.txt", "--vocab-size", 300)),
        ("commands.adopt.load_model", ("adopt", "home/models/toy", "--name", "new")),
        ("commands.export.write_gguf", ("export", "toy", "--out", "toy.gguf")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_ends_at_once_and_leaves_nothing_incomplete(
    toy, toy_file, tmp_path, monkeypatch, function, words, signum, code
):
    monkeypatch.chdir(tmp_path)
    process = start_program(SLEEP_AFTER, f"nanoghost.{function}", 600, *words)
    exit_code, err, seconds = stop(process, signum)
    assert exit_code == code
    assert err.strip() == "nanoghost: stopped"
    assert seconds < LIMIT + ALLOWANCE
    assert not [path for pattern in ("*.tmp", ".adopting*", "*.gguf") for path in tmp_path.rglob(pattern)]


def pretrain_that_sleeps_in_its_evaluation(toy_file, seconds: float) -> subprocess.Popen:
    words = ("pretrain", "--name", "new", "--data", toy_file, "--steps", 3, *TOY_FLAGS)
    return start_program(SLEEP_AFTER, "nanoghost.train.pretrain.final_bits_per_byte", seconds, *words)


def test_after_the_last_step_the_model_is_evaluated_and_finished(toy_file, home):
    code, err, _ = stop(pretrain_that_sleeps_in_its_evaluation(toy_file, 1), signal.SIGINT)
    assert code == 0
    assert "stopping after the model is saved and evaluated" in err and "Traceback" not in err
    assert ModelFolder("new").is_finished


def test_a_second_signal_ends_a_stage_at_once(toy_file, home):
    process = pretrain_that_sleeps_in_its_evaluation(toy_file, 600)
    process.send_signal(signal.SIGINT)
    while "stopping after" not in process.stderr.readline():
        pass
    code, err, seconds = stop(process, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert seconds < LIMIT + ALLOWANCE
    assert not ModelFolder("new").is_finished


GO_ON_AFTER_CTRL_C = """
import sys, time
from nanoghost.errors import StopSignals

with StopSignals() as stop_signals:
    interrupts = 0
    while interrupts < 3:
        try:
            print("READY", interrupts, file=sys.stderr, flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            interrupts += 1
    time.sleep(2 * StopSignals.SECONDS + 1)  # the thread of StopSignals sees that the signals were handled
print("went on")
"""


def test_a_command_that_handles_ctrl_c_goes_on():
    """As a chat does: Ctrl-C ends a reply."""
    process = start_program(GO_ON_AFTER_CTRL_C)
    process.send_signal(signal.SIGINT)
    for interrupts in (1, 2):
        assert process.stderr.readline() == f"READY {interrupts}\n"
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err, out) == (0, "", "went on\n")
