"""The disposable process of sandbox.py: it gives up what it can, loads CPython for WASI, runs one program and is gone.

    python -I -S sandbox_child.py FOLDER compile PYTHON.wasm COMPILED     translate the module to machine code
    python -I -S sandbox_child.py FOLDER run COMPILED SECONDS             run the program that stands on standard input

FOLDER is where wasmtime is installed. What the program prints goes to standard output, its errors too. This file imports
nothing of nanoghost.
"""

import ctypes
import os
import resource
import signal
import sys

MEMORY = 256 * 2**20
"""Bytes that the program may use; Python itself takes about 20 MB of them."""
CANNOT_LOAD = 3
"""Exit code: the compiled module is damaged, or of another processor."""

# What runs inside, a cell of a notebook: the value of a last expression is shown. sys.argv[1] is the program, as a literal.
# _ast is what `ast` is made of; importing all of it would take longer than most programs.
NOTEBOOK = """
import _ast, sys
sys.stdout.reconfigure(errors="replace")
names = {"__name__": "__main__"}
try:
    tree = compile(eval(sys.argv[1]), "program", "exec", _ast.PyCF_ONLY_AST)
    last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    exec(compile(tree, "program", "exec"), names)
    value = eval(compile(_ast.Expression(last), "program", "eval"), names) if last else None
    if value is not None:
        print(repr(value))
except SystemExit:
    pass
except BaseException as error:
    import traceback
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "program"]
    where = f" (line {lines[-1]})" if lines else f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
    print("error: " + traceback.format_exception_only(error)[-1].strip() + where)
"""


def give_up(seconds: float) -> None:
    """Limits that hold even if WebAssembly's own walls did not.

    The number of processes stays as it is: the limit counts threads of the whole user, and wasmtime starts two. Nor is the
    address space limited: wasmtime reserves gigabytes of it, so that no access needs a check, and uses few of them.
    """
    whole = int(seconds) + 1
    limits = {"CPU": whole, "FSIZE": 0, "CORE": 0, "NOFILE": 32, "DATA": 4 * MEMORY}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # the kernel ends this process even if the parent is gone
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no setuid program gives rights back


def run(compiled: str, seconds: str) -> None:
    import wasmtime

    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    engine = wasmtime.Engine()
    try:
        module = wasmtime.Module.deserialize_file(engine, compiled)
    except wasmtime.WasmtimeError:
        os._exit(CANNOT_LOAD)
    give_up(float(seconds))
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=MEMORY, instances=1, memories=1, tables=1)
    wasi = wasmtime.WasiConfig()  # no folder, no standard input, and of the environment only this:
    wasi.env = [("PYTHONHASHSEED", "0")]  # the same program prints its sets in the same order
    wasi.argv = ["python", "-S", "-u", "-c", NOTEBOOK, ascii(program)]
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    store.set_wasi(wasi)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    start = linker.instantiate(store, module).exports(store)["_start"]
    try:
        start(store)
    except wasmtime.ExitTrap:
        pass
    except wasmtime.Trap as trap:  # too deep a recursion in C
        print(f"\nerror: the interpreter broke down: {trap.message.splitlines()[-1].strip()}", flush=True)
    os._exit(0)


def compile_module(wasm: str, compiled: str) -> None:
    import wasmtime

    with open(compiled, "wb") as f:
        f.write(wasmtime.Module.from_file(wasmtime.Engine(), wasm).serialize())
        f.flush()
        os.fsync(f.fileno())


if __name__ == "__main__":
    folder, verb, *words = sys.argv[1:]
    sys.path.append(folder)
    {"run": run, "compile": compile_module}[verb](*words)
