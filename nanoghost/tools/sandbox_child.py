"""The disposable process of sandbox.py: it drops its rights, loads CPython for WASI, runs one program and exits.

    python -I -S sandbox_child.py FOLDER compile PYTHON.wasm COMPILED     compile the module to machine code
    python -I -S sandbox_child.py FOLDER run COMPILED SECONDS             run the program on standard input

FOLDER is where wasmtime is installed. Output and errors of the program go to standard output. This file imports
nothing of nanoghost.
"""

import ctypes
import os
import resource
import signal
import sys

MEMORY = 256 * 2**20
"""Memory limit of the program in bytes. Python itself uses about 20 MB."""
CANNOT_LOAD = 3
"""Exit code: the compiled module is damaged, or was compiled for another processor."""

# Runs inside the sandbox, like a notebook cell: the value of a last expression is printed. sys.argv[1] is the program,
# as a literal. _ast is the C part of `ast`; importing all of `ast` would take longer than most programs.
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


def drop_rights(seconds: float) -> None:
    """Set kernel limits that hold even if a program breaks out of WebAssembly.

    The number of processes is not limited: that limit counts the threads of all processes of the user, and wasmtime
    starts two. The address space is not limited either: wasmtime reserves gigabytes of it to avoid checks, and uses
    little.
    """
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_DATA: 4 * MEMORY,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)  # the kernel kills this process even if the parent is gone
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: setuid programs cannot restore rights


def run(compiled: str, seconds: str) -> None:
    import wasmtime

    program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    engine = wasmtime.Engine()
    try:
        module = wasmtime.Module.deserialize_file(engine, compiled)
    except wasmtime.WasmtimeError:
        os._exit(CANNOT_LOAD)
    drop_rights(float(seconds))
    store = wasmtime.Store(engine)
    store.set_limits(memory_size=MEMORY, instances=1, memories=1, tables=1)
    wasi = wasmtime.WasiConfig()  # no folders, no standard input, an environment of one variable
    wasi.env = [("PYTHONHASHSEED", "0")]  # programs print sets always in the same order
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
    except wasmtime.Trap as trap:  # for example a recursion in C that is too deep
        last_line = trap.message.strip().split("\n")[-1]
        print(f"\nerror: the interpreter broke down: {last_line.strip()}", flush=True)
    os._exit(0)


def compile_module(wasm: str, compiled: str) -> None:
    import wasmtime

    with open(compiled, "wb") as f:
        f.write(wasmtime.Module.from_file(wasmtime.Engine(), wasm).serialize())
        f.flush()
        os.fsync(f.fileno())


if __name__ == "__main__":
    package_folder, action, *arguments = sys.argv[1:]
    sys.path.append(package_folder)
    if action == "compile":
        compile_module(*arguments)
    else:
        run(*arguments)
