"""The operators of kernels.cpp, compiled once for this machine and kept in the home folder."""

import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from nanoghost import machine
from nanoghost.runs import home

SOURCE = Path(__file__).with_name("kernels.cpp")
INSTRUCTIONS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni", "avx512_bf16", "f16c", "fma3")


@cache
def unavailable() -> str:
    """Load the operators, compiling them first if need be; returns why they cannot be had, empty if they can."""
    has = torch.cpu.get_capabilities()
    if missing := [name for name in INSTRUCTIONS if not has.get(name)]:
        return f"this processor lacks {', '.join(missing)}"
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = home() / "kernels" / f"{key}.so"
    if not library.exists():
        if not machine.has_compiler():
            return "there is no C++ compiler"
        if complaint := build(library):
            return complaint
    torch.ops.load_library(library)
    return ""


def build(library: Path) -> str:
    """Compile, in about twenty seconds; returns the compiler's complaint, if it has one."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    flags += [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in INSTRUCTIONS]
    flags += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        made = Path(temporary, library.name)
        command = [machine.compiler_name(), *flags, str(SOURCE), "-o", str(made), "-ltorch", "-ltorch_cpu", "-lc10"]
        print("compiling the engine's operators, once (about 20 s) ...", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the C++ compiler says: {(done.stderr.strip().splitlines() or ['nothing'])[0]}"
        made.rename(library)
    return ""
