"""The sandbox: what programs can do there, and that everything else fails without harm."""

import os
import resource
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.errors import UserError
from nanoghost.tools import sandbox
from nanoghost.tools.sandbox import MAX_CODE_CHARACTERS, MAX_OUTPUT_BYTES, printable, run_python

SECRET = "the-queen-keeps-bees"
LINUX = sys.platform == "linux"


def run(code: str, seconds: float = 5.0) -> str:
    return run_python(code, seconds)


# ── what programs can do ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "code, output",
    [
        ("1 + 2", "3"),
        ("print(1)\n'two'", "1\n'two'"),
        ("x = 5", ""),
        ("None", ""),
        ("", ""),
        ("# nothing", ""),
        ("for i in range(3):\n    print(i)", "0\n1\n2"),
        ("'strawberry'.count('r')", "3"),
        ("print('Voilà: 2 € 👻')", "Voilà: 2 € 👻"),
        ("def f(n):\n    return n and n + f(n - 1)\n\nf(100)", "5050"),
        ("import math, json, re, random, datetime, statistics, fractions\nmath.factorial(20)", "2432902008176640000"),
        ("{'a': [1, 2.5]}", "{'a': [1, 2.5]}"),
        ("__name__", "'__main__'"),
        ("1 / 0", "error: ZeroDivisionError: division by zero (line 1)"),
        ("print('before')\n\nx = y", "before\nerror: NameError: name 'y' is not defined (line 3)"),
        ("def f(:", "error: SyntaxError: invalid syntax (line 1)"),
        ("def f():\n    raise ValueError('no')\n\nf()", "error: ValueError: no (line 2)"),
        ("import sys\nprint('a')\nsys.exit(3)", "a"),
        ("input()", "error: EOFError: EOF when reading a line (line 1)"),
    ],
)
def test_output_of_programs(code, output):
    assert run(code) == output


SUM = st.tuples(st.integers(-(10**9), 10**9), st.sampled_from("+-*"), st.integers(-(10**9), 10**9))


@settings(max_examples=3, deadline=None)
@given(st.lists(SUM, min_size=1, max_size=50), st.lists(st.text(max_size=30), max_size=30))
def test_results_and_texts_are_the_same_as_in_python(sums, texts):
    sums = ", ".join(f"({a}) {operation} ({b})" for a, operation, b in sums)
    output = run(f"print([{sums}])\nprint(ascii({texts!r}))")
    assert output == f"{eval(f'[{sums}]')}\n{ascii(texts)}"


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_output_has_no_control_characters(output):
    shown = printable(output)
    assert all(c.isprintable() or c in "\t\n" or not c.isascii() for c in shown)
    assert shown.isascii() or "\x9b" not in shown


def test_output_is_deterministic():
    program = "print({'a', 'b', 'c', 'd'}, hash('x'))"
    assert run(program) == run(program)


def test_programs_that_run_at_once_are_isolated():
    programs = [f"import time\nx = {i}\ntime.sleep(0.3)\nx" for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, programs)) == ["0", "1"]


def test_a_program_that_is_too_long_is_not_started():
    assert run("#" * (MAX_CODE_CHARACTERS + 1)) == f"error: a program of more than {MAX_CODE_CHARACTERS} characters"
    assert run("'é€👻'" + "#" * (MAX_CODE_CHARACTERS - 5)) == "'é€👻'"


# ── what programs cannot do ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def every_character():
    """Hypothesis builds its table of all characters in 200 MB of memory, once; do it before memory is measured."""
    settings(max_examples=1, database=None)(given(st.text())(lambda text: None))()


@pytest.fixture(autouse=True)
def unharmed(every_character, python_sandbox, home, tmp_path, monkeypatch):
    """Plant secrets, and check afterwards that this process has not changed."""
    monkeypatch.setenv("NANOGHOST_SECRET", SECRET)
    (tmp_path / "secret.txt").write_text(SECRET)

    def state():
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return os.getcwd(), environment, open_files(), sorted(os.listdir(tmp_path)), sorted(os.listdir("."))

    with open(tmp_path / "secret.txt") as secret_file:
        before, memory = state(), peak_memory()
        yield
        assert state() == before
        assert peak_memory() - memory < 64 * 2**20
        assert secret_file.read() == SECRET
        assert (tmp_path / "secret.txt").read_text() == SECRET
    assert not still_running(str(home))


def peak_memory() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if LINUX else 1)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def still_running(word: str) -> list[str]:
    """Command lines of processes that have the word in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline") if LINUX else ():
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended meanwhile
            continue
        found += [line] if word in line and "sandbox_child" in line else []
    return found


ESCAPES = {
    # name: (program, start of its output, or several possible starts)
    "read a file": ("open('/etc/passwd').read()", "error: FileNotFoundError"),
    "read the home": ("import os\nos.listdir(os.path.expanduser('~'))", "error: "),
    "list the root": ("import os\nos.listdir('/')", "error: FileNotFoundError"),
    "climb out of the library": ("open('/usr/local/lib/python3.12/../../../../../etc/passwd').read()", "error: "),
    "read the secret": ("open({secret!r}).read()", "error: FileNotFoundError"),
    "write a file": ("open({folder!r} + '/new', 'w').write('x')", "error: "),
    "write here": ("open('new', 'w').write('x')", "error: "),
    "write a temporary file": ("import tempfile\ntempfile.TemporaryFile()", "error: "),
    "remove a file": ("import os\nos.remove({secret!r})", "error: "),
    "link to a file": ("import os\nos.symlink('/etc/passwd', 'p')\nopen('p').read()", "error: "),
    "link in the library": ("import os\nos.symlink('/etc', '/usr/local/lib/python3.12/etc')", "error: "),
    "mount": ("import os\nos.chroot('/')", "error: AttributeError"),
    "open files of others": (
        "import os\nfor fd in range(3, 200):\n    try:\n        print(fd, os.read(fd, 100))\n"
        "    except OSError:\n        pass\n'none'",
        "'none'",
    ),
    "connect": ("import socket\nsocket.create_connection(('127.0.0.1', {port}))", "error: "),
    "listen": ("import socket\nsocket.socket().bind(('127.0.0.1', 8159))", "error: "),
    "fetch": ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/').read()", "error: "),
    "resolve": ("import socket\nsocket.getaddrinfo('localhost', 80)", "error: "),
    "fork": ("import os\nos.fork()", "error: AttributeError"),
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "error: AttributeError"),
    "shell": ("import os\nos.system('id')", "error: AttributeError"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh'])", "error: "),
    "subprocess": ("import subprocess\nsubprocess.run(['id'])", "error: OSError"),
    "thread bomb": ("import threading\nwhile True:\n    threading.Thread(target=print).start()", "error: RuntimeError"),
    "multiprocessing": ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "error: "),
    "signal the parent": ("import os\nos.kill(os.getppid(), 9)", "error: AttributeError"),
    "signal a number": ("import os\nos.kill({pid}, 9)", "error: AttributeError"),
    "processes": ("import os\nos.listdir('/proc')", "error: FileNotFoundError"),
    "its own memory": ("open('/proc/self/mem', 'rb').read(1)", "error: FileNotFoundError"),
    "its command line": ("open('/proc/self/cmdline').read()", "error: FileNotFoundError"),
    "devices": ("open('/dev/zero', 'rb').read(9)", "error: FileNotFoundError"),
    "C": ("import ctypes\nctypes.CDLL(None).system(b'id')", "error: ModuleNotFoundError"),
    "machine code": ("import mmap", "error: ModuleNotFoundError"),
    "packages of the host": ("import torch", "error: ModuleNotFoundError"),
    "us": ("import nanoghost", "error: ModuleNotFoundError"),
    "the environment": ("import os\ndict(os.environ)", "{'PYTHONHASHSEED': '0'}"),
    "who it is": ("import os\nos.getuid()", "error: AttributeError"),
    "much memory": ("bytearray(10**9)", "error: MemoryError"),
    "memory bit by bit": ("x = []\nwhile True:\n    x.append(bytearray(10**7))", "error: MemoryError"),
    "a large number": ("x = 10 ** (10 ** 9)", ("error: MemoryError", "(stopped after 1 s)")),
    "deep recursion": ("def f(): return f()\nf()", "error: RecursionError"),
    "deep recursion in C": (
        "import itertools\nit = iter('a')\nfor _ in range(10**5):\n    it = itertools.chain(it)\nnext(it)",
        "error: the interpreter broke down",
    ),
    "a deep expression": ("eval('-' * 10**5 + '1')", "error: "),
    "endless loop": ("while True: pass", "(stopped after 1 s)"),
    "endless sleep": ("import time\ntime.sleep(10**6)", "(stopped after 1 s)"),
    "endless work in C": ("pow(3, 10**7) % 7\nsum(range(10**11))", ("(stopped after 1 s)", "error: ")),
    "endless regular expression": ("import re\nre.match('(a+)+b', 'a' * 40)", "(stopped after 1 s)"),
    "an exception that is not to be caught": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass", "(stopped after 1 s)"
    ),
    "a crash": ("import os\nos.abort()", "error: "),
    "closing its output": ("import os\nos.close(1)\nwhile True: pass", "(stopped after 1 s)"),
    "exit code": ("import os\nos._exit(3)", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_the_sandbox_cannot_be_escaped(name, tmp_path):
    program, expected = ESCAPES[name]
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {
            "secret": str(tmp_path / "secret.txt"),
            "folder": str(tmp_path),
            "port": server.getsockname()[1],
            "pid": os.getpid(),
        }
        for key, value in names.items():
            program = program.replace("{" + key + "!r}", repr(value)).replace("{" + key + "}", str(value))
        start = time.monotonic()
        output = run(program, 1.0 if "stopped" in str(expected) else 5.0)
        seconds = time.monotonic() - start
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert output.startswith(expected), output
    assert SECRET not in output
    assert "root:" not in output
    assert seconds < (2.0 if "stopped" in output else 6.0), "the time limit holds within a second"


@pytest.mark.parametrize(
    "program",
    ["while True: print('y' * 1000)", "import sys\nsys.stderr.write('y' * 10**8)", "raise ValueError('y' * 10**7)",
     "'y' * 10**7", "import os\nwhile True: os.write(2, b'y' * 10**6)"],
)  # fmt: skip
def test_too_much_output_stops_the_program(program):
    start = time.monotonic()
    output = run(program)
    assert output.endswith(f"(stopped after {MAX_OUTPUT_BYTES} bytes of output)")
    assert len(output) < MAX_OUTPUT_BYTES + 60
    assert time.monotonic() - start < 4


def test_output_before_the_timeout_is_returned():
    assert run("print('so far')\nwhile True: pass", 1.0) == "so far\n(stopped after 1 s)"


def test_a_program_cannot_change_the_library_for_others():
    """The library is in the memory of the program, which is gone with it."""
    library = "/usr/local/lib/python3.12/new.py"
    run(f"with open({library!r}, 'w') as f:\n    f.write({SECRET!r})")
    assert run(f"open({library!r}).read()").startswith("error: FileNotFoundError")


def test_invalid_bytes_in_the_output():
    output = run(r"import os" "\n" r"os.write(1, b'a\x00b\x1b[2Jc\xff\xfe\r\nd\x9b')" "\n" r"print('\ud800\x07')")
    assert output.startswith("ab[2Jc��\nd�")
    assert output.isprintable() is False
    assert "\x1b" not in output
    assert "\0" not in output


def test_the_kernel_kills_a_program_whose_parent_is_gone():
    """Only the alarm of the child ends it: here no parent does."""
    command = sandbox._command("run", sandbox.compiled_module(), 0.2)
    start = time.monotonic()
    done = subprocess.run(command, input=b"import time\ntime.sleep(100)", capture_output=True, env={}, check=False)
    assert done.returncode == -14
    assert time.monotonic() - start < 3  # SIGALRM


# ── the compiled interpreter ─────────────────────────────────────────────────────────────────────────────────────────


def test_machine_code_is_only_run_if_no_other_user_could_write_it(home, monkeypatch):
    path = sandbox.compiled_module()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    compiled = []

    def remember(command, **options):
        compiled.append(command[-1])
        Path(command[-1]).write_bytes(b"new")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", remember)
    assert sandbox.compiled_module() == path
    assert not compiled
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved)
    assert sandbox.compiled_module().read_bytes() == b"new"
    assert len(compiled) == 1
    assert not path.is_symlink()
    path.chmod(0o622)
    assert sandbox.compiled_module() == path
    assert len(compiled) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.parent.chmod(0o777)
    with pytest.raises(UserError, match="chmod 700"):
        sandbox.compiled_module()
    path.parent.chmod(0o700)


def test_a_damaged_module_is_compiled_again(home, monkeypatch):
    path = sandbox.compiled_module()
    whole = path.rename(path.with_name("whole"))
    path.write_bytes(b"\x7fELF" + b"\0" * 1000)
    path.chmod(0o600)
    compiled = []

    def again(command, **options):
        compiled.append(command)
        os.link(whole, command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", again)
    assert run("6 * 7") == "42"
    assert len(compiled) == 1


def test_the_home_can_be_a_relative_path(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", os.path.relpath(home))
        assert run("6 * 7") == "42"


def test_a_failed_compilation_leaves_no_files(home, monkeypatch, capfd):
    path = sandbox.compiled_module()
    path.unlink()
    monkeypatch.setattr(sandbox, "_wasm_file", lambda: home / "nothing.wasm")
    with pytest.raises(UserError, match="see the messages above"):
        run("1")
    assert not list(path.parent.iterdir())
    assert "nothing.wasm" in capfd.readouterr().err


def test_only_the_expected_interpreter_is_compiled(monkeypatch):
    monkeypatch.setattr(sandbox, "WASM_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"nanoghost\[sandbox\]"):
        run("1")


def test_without_the_sandbox_no_program_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not sandbox.is_installed()
    with pytest.raises(UserError, match=r"pip install 'nanoghost\[sandbox\]'"):
        run("1")
