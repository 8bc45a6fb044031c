"""The operators of kernels.cpp, compiled once for this machine and kept in the home folder."""

import hashlib
import subprocess
from functools import cache
from pathlib import Path

import torch

from nanoghost.runs import home

SOURCE = Path(__file__).with_name("kernels.cpp")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "f16c", "fma")


@cache
def available() -> str:
    """Empty if the operators are there now (compiled if need be), otherwise the reason why they are not."""
    from torch.utils import cpp_extension

    flags = ["-O3", "-fopenmp", *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS)]
    known = Path("/proc/cpuinfo")
    has = set(known.read_text().partition("flags")[2].partition("\n")[0].split()) if known.exists() else set()
    if missing := [name for name in INSTRUCTIONS if name not in has]:
        return f"this processor lacks {', '.join(missing)}"
    name = "kernels-" + hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = home() / "kernels" / name
    if (folder / f"{name}.so").exists():
        torch.ops.load_library(folder / f"{name}.so")
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.CalledProcessError) as e:
        return f"no C++ compiler that works ({str(e).splitlines()[0]})"
    return ""
