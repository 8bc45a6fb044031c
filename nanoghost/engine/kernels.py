"""The operators of kernels.cpp, compiled once for this machine and kept in the home folder."""

import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.home import home

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "lanes.h")]
INSTRUCTION_SETS = (  # as lanes.h knows them, the better one first
    ("avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni", "avx512_bf16", "f16c", "fma3"),
    ("avx2", "f16c", "fma3"),
)


@cache
def unavailable_reason() -> str:
    """Load the operators, compiling them first if need be; returns why they cannot be had, empty if they can."""
    instructions = best(torch.cpu.get_capabilities())
    if not instructions:
        return f"this processor lacks {', '.join(INSTRUCTION_SETS[-1])}"
    known = b"".join(path.read_bytes() for path in SOURCES) + " ".join([torch.__version__, *instructions]).encode()
    key = hashlib.sha256(known).hexdigest()[:12]
    library = home() / "kernels" / f"{key}.so"
    if not library.exists():
        if not hardware.has_compiler():
            return "there is no C++ compiler"
        if complaint := build(library, instructions):
            return complaint
    torch.ops.load_library(library)
    return ""


def best(has: dict) -> tuple[str, ...]:
    """The instructions to compile for; none, if this is no machine for it."""
    return next((names for names in INSTRUCTION_SETS if all(has.get(name) for name in names)), ())


def build(library: Path, instructions: tuple[str, ...]) -> str:
    """Compile, in about twenty seconds; returns the compiler's complaint, if it has one."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    flags += [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in instructions]
    flags += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        made = Path(temporary, library.name)
        command = [
            hardware.compiler_name(),
            *flags,
            str(SOURCES[0]),
            "-o",
            str(made),
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        print("compiling the engine's operators, once (about 20 s) ...", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"the C++ compiler says: {(done.stderr.strip().splitlines() or ['nothing'])[0]}"
        made.rename(library)
    return ""
