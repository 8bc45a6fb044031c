"""The sandbox: what a program may do there, and that what it may not do fails without harm to anybody."""

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


# ── what it is for ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "code, said",
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
def test_a_program_answers_as_a_cell_of_a_notebook(code, said):
    assert run(code) == said


SUM = st.tuples(st.integers(-(10**9), 10**9), st.sampled_from("+-*"), st.integers(-(10**9), 10**9))


@settings(max_examples=3, deadline=None)
@given(st.lists(SUM, min_size=1, max_size=50), st.lists(st.text(max_size=30), max_size=30))
def test_sums_are_pythons_own_and_any_text_goes_in_and_out(sums, texts):
    sums = ", ".join(f"({a}) {operation} ({b})" for a, operation, b in sums)
    said = run(f"print([{sums}])\nprint(ascii({texts!r}))")
    assert said == f"{eval(f'[{sums}]')}\n{ascii(texts)}"


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_what_is_shown_has_no_control_characters(said):
    shown = printable(said)
    assert all(c.isprintable() or c in "\t\n" or not c.isascii() for c in shown)
    assert shown.isascii() or "\x9b" not in shown


def test_a_program_always_prints_the_same():
    program = "print({'a', 'b', 'c', 'd'}, hash('x'))"
    assert run(program) == run(program)


def test_two_at_once_know_nothing_of_each_other():
    programs = [f"import time\nx = {i}\ntime.sleep(0.3)\nx" for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, programs)) == ["0", "1"]


def test_too_long_a_program_is_not_started():
    assert run("#" * (MAX_CODE_CHARACTERS + 1)) == f"error: a program of more than {MAX_CODE_CHARACTERS} characters"
    assert run("'é€👻'" + "#" * (MAX_CODE_CHARACTERS - 5)) == "'é€👻'"


# ── what it must hold ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def every_character():
    """Hypothesis makes its table of all characters in 200 MB of this process, once: before memory is looked at."""
    settings(max_examples=1, database=None)(given(st.text())(lambda text: None))()


@pytest.fixture(autouse=True)
def unharmed(every_character, python_sandbox, home, tmp_path, monkeypatch):
    """Plants secrets, and looks afterwards whether this process is as it was."""
    monkeypatch.setenv("NANOGHOST_SECRET", SECRET)
    (tmp_path / "secret.txt").write_text(SECRET)

    def state():
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        return os.getcwd(), environment, open_files(), sorted(os.listdir(tmp_path)), sorted(os.listdir("."))

    with open(tmp_path / "secret.txt") as kept:
        before, memory = state(), most_memory()
        yield
        assert state() == before and most_memory() - memory < 64 * 2**20
        assert kept.read() == SECRET and (tmp_path / "secret.txt").read_text() == SECRET
    assert not still_running(str(home))


def most_memory() -> int:
    """Bytes that this process held at its largest."""
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
    # program -> how its answer begins, or any of several beginnings
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
        "import os\nfor fd in range(3, 200):\n    try:\n        print(fd, os.read(fd, 100))\n    except OSError:\n        pass\n'none'",
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
def test_no_way_out(name, tmp_path):
    program, begins = ESCAPES[name]
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
        said = run(program, 1.0 if "stopped" in str(begins) else 5.0)
        seconds = time.monotonic() - start
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()
    assert said.startswith(begins), said
    assert SECRET not in said and "root:" not in said
    assert seconds < (2.0 if "stopped" in said else 6.0), "the time limit holds within a second"


@pytest.mark.parametrize(
    "program",
    ["while True: print('y' * 1000)", "import sys\nsys.stderr.write('y' * 10**8)", "raise ValueError('y' * 10**7)",
     "'y' * 10**7", "import os\nwhile True: os.write(2, b'y' * 10**6)"],
)  # fmt: skip
def test_a_flood_is_stopped(program):
    start = time.monotonic()
    said = run(program)
    assert said.endswith(f"(stopped after {MAX_OUTPUT_BYTES} bytes of output)") and len(said) < MAX_OUTPUT_BYTES + 60
    assert time.monotonic() - start < 4


def test_what_was_printed_before_the_end_is_told():
    assert run("print('so far')\nwhile True: pass", 1.0) == "so far\n(stopped after 1 s)"


def test_what_one_program_changes_no_other_sees():
    """The library is a part of the program's own memory, which is gone with it."""
    library = "/usr/local/lib/python3.12/new.py"
    run(f"with open({library!r}, 'w') as f:\n    f.write({SECRET!r})")
    assert run(f"open({library!r}).read()").startswith("error: FileNotFoundError")


def test_odd_bytes_do_no_harm():
    said = run(r"import os" "\n" r"os.write(1, b'a\x00b\x1b[2Jc\xff\xfe\r\nd\x9b')" "\n" r"print('\ud800\x07')")
    assert said.startswith("ab[2Jc��\nd�") and said.isprintable() is False and "\x1b" not in said and "\0" not in said


def test_the_kernel_ends_a_program_whose_parent_is_gone():
    """The alarm of the child alone: nobody kills it here."""
    command = sandbox._command("run", sandbox.compiled_module(), 0.2)
    start = time.monotonic()
    done = subprocess.run(command, input=b"import time\ntime.sleep(100)", capture_output=True, env={}, check=False)
    assert done.returncode == -14 and time.monotonic() - start < 3  # SIGALRM


# ── the compiled interpreter ────────────────────────────────────────────────────────────────────────────────────────


def test_machine_code_is_run_only_if_nobody_else_could_write_it(home, monkeypatch):
    path = sandbox.compiled_module()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    compiled = []

    def remember(command, **options):
        compiled.append(command[-1])
        Path(command[-1]).write_bytes(b"new")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", remember)
    assert sandbox.compiled_module() == path and not compiled
    kept = path.rename(path.with_name("kept"))
    path.symlink_to(kept)
    assert sandbox.compiled_module().read_bytes() == b"new" and len(compiled) == 1 and not path.is_symlink()
    path.chmod(0o622)
    assert sandbox.compiled_module() == path and len(compiled) == 2 and stat.S_IMODE(path.stat().st_mode) == 0o600
    path.parent.chmod(0o777)
    with pytest.raises(UserError, match="chmod 700"):
        sandbox.compiled_module()
    path.parent.chmod(0o700)


def test_a_damaged_module_is_compiled_again(home, monkeypatch):
    path = sandbox.compiled_module()
    whole = path.rename(path.with_name("kept"))
    path.write_bytes(b"\x7fELF" + b"\0" * 1000)
    path.chmod(0o600)
    compiled = []

    def again(command, **options):
        compiled.append(command)
        os.link(whole, command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", again)
    assert run("6 * 7") == "42" and len(compiled) == 1


def test_the_home_may_be_named_from_here(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", os.path.relpath(home))
        assert run("6 * 7") == "42"


def test_a_failed_compilation_leaves_nothing(home, monkeypatch, capfd):
    path = sandbox.compiled_module()
    path.unlink()
    monkeypatch.setattr(sandbox, "_wasm_file", lambda: home / "nothing.wasm")
    with pytest.raises(UserError, match="see the messages above"):
        run("1")
    assert not list(path.parent.iterdir()) and "nothing.wasm" in capfd.readouterr().err


def test_only_the_interpreter_we_know_is_compiled(monkeypatch):
    monkeypatch.setattr(sandbox, "WASM_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"nanoghost\[sandbox\]"):
        run("1")


def test_without_the_sandbox_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not sandbox.available()
    with pytest.raises(UserError, match=r"pip install 'nanoghost\[sandbox\]'"):
        run("1")
