"""The C++ operators of kernels.cpp: compiled once for this machine, stored in the home folder."""

import hashlib
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.home import home

SOURCE_NAMES = ("kernels.cpp", "matmul.h", "attention.h", "workspace.h", "lanes.h")
SOURCES = [Path(__file__).with_name(name) for name in SOURCE_NAMES]
# The instruction sets that lanes.h has code for, the fastest first; names as in torch.cpu.get_capabilities.
INSTRUCTION_SETS = (
    ("avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni", "avx512_bf16", "f16c", "fma3"),
    ("avx2", "f16c", "fma3"),
)


@cache
def unavailable_reason() -> str:
    """Load the operators, compiled first if necessary. Returns why they are not available; empty if they are."""
    instructions = best_instruction_set(torch.cpu.get_capabilities())
    if not instructions:
        return f"this processor lacks {', '.join(INSTRUCTION_SETS[-1])}"
    library = home() / "kernels" / f"{cache_key(instructions)}.so"
    if not library.exists():
        if not hardware.has_compiler():
            return "there is no C++ compiler"
        if error := build(library, instructions):
            return error
    torch.ops.load_library(library)
    return ""


def best_instruction_set(capabilities: dict) -> tuple[str, ...]:
    """The first instruction set that a processor has completely; empty if it has none."""
    for instructions in INSTRUCTION_SETS:
        if all(capabilities.get(name) for name in instructions):
            return instructions
    return ()


def cache_key(instructions: tuple[str, ...]) -> str:
    """Hash of everything that a compiled library depends on."""
    sources = b"".join(path.read_bytes() for path in SOURCES)
    settings = " ".join([torch.__version__, *instructions])
    return hashlib.sha256(sources + settings.encode()).hexdigest()[:12]


def build(library: Path, instructions: tuple[str, ...]) -> str:
    """Compile (about 20 seconds). Returns the first line of the compiler's errors; empty if there are none."""
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import (0.25 s), and rarely needed

    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    flags += [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in instructions]
    flags += [f"-I{path}" for path in include_paths()]
    flags += [f"-L{path}" for path in library_paths()]
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        output = Path(temporary, library.name)
        command = [hardware.compiler_name(), *flags, str(SOURCES[0]), "-o", str(output)]
        command += ["-ltorch", "-ltorch_cpu", "-lc10"]
        print("compiling the engine's C++ kernels (once, about 20 s) ...", file=sys.stderr)
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            first_line = (result.stderr.strip() or "no error message").split("\n")[0]
            return f"the C++ compiler failed: {first_line}"
        output.rename(library)
    return ""
