"""The operators of kernels.cpp, compiled once for this machine and kept in the home folder."""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

import torch

from nanoghost import machine
from nanoghost.runs import home, replacing

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
        build(library)
    torch.ops.load_library(library)
    return ""


def build(library: Path) -> None:
    """About twenty seconds."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"]
    flags += [f"-m{name.replace('_', '').replace('fma3', 'fma')}" for name in INSTRUCTIONS]
    flags += [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    library.parent.mkdir(parents=True, exist_ok=True)
    temporary = library.with_name(f".{library.name}.{os.getpid()}.tmp")
    with replacing(temporary, library):
        command = [
            machine.compiler_name(),
            *flags,
            str(SOURCE),
            "-o",
            str(temporary),
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ]
        subprocess.run(command, check=True)
