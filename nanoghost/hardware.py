"""What this computer can do: number format, threads, devices, ranks. `nanoghost doctor` (doctor.py) measures it.

Nothing happens at import. A stage calls `prepare()` once, and `start_ranks()` if it can run under torchrun.
"""

import ctypes
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch

from nanoghost.errors import UserError

# The few that decide how fast training and quantised decoding can be (names as in torch.cpu.get_capabilities).
INSTRUCTION_SETS_THAT_MATTER = (
    "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon", "dot", "i8mm", "bf16", "sve",
)  # fmt: skip


# -- set-up -----------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Set up this process for heavy work; every stage calls it once, before it makes its first large tensor."""
    # Small gradients and optimizer moments end as denormals, which many CPUs compute in slow microcode. The flag
    # belongs to a thread and is inherited by threads it starts: set it before the first parallel operation.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads())
    # oneDNN keeps the code it made for each shape of a product, 1024 of them by default. Generation makes new shapes
    # with every token, and they took a gigabyte in half an hour of work (measured); it reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if platform.libc_ver()[0] == "glibc":
        # glibc serves a large block with a fresh mmap and unmaps it when freed, so every large tensor pays again
        # for page faults, 4 KB at a time. Without mmap and trimming, blocks are reused: elementwise operations
        # in training ran 3x faster (measured). The price: a process keeps its peak memory until it ends.
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# -- facts ------------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """Where this process computes: its own CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UserError(f"process {index} of this node has no GPU: there are only {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def instruction_sets() -> list[str]:
    capabilities = torch.cpu.get_capabilities()
    return [name for name in INSTRUCTION_SETS_THAT_MATTER if capabilities.get(name)]


def cpu_dtype(flags: Collection[str]) -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32 (emulated bf16 is slower than fp32)."""
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def compute_dtype(on: torch.device | None = None) -> torch.dtype:
    """The format of matrix products; master weights are float32. Never fp16: its range needs loss scaling."""
    on = on or device()
    if on.type == "cpu":
        return cpu_dtype(instruction_sets())
    if on.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def cores() -> int:
    """Physical cores this process may use: its affinity, hyperthreads counted once, within a container's quota."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return torch.cpu.get_capabilities()["num_physical_cores"]
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    available = os.sched_getaffinity(0)
    known = all(Path(siblings.format(cpu)).exists() for cpu in available)  # some sandboxes hide it
    count = len({Path(siblings.format(cpu)).read_text() for cpu in available}) if known else len(available)
    quota, _, period = container_limit("cpu.max").partition(" ")
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def container_limit(name: str) -> str:
    """One limit of the container we are in (cgroup v2, kernel's cgroup-v2.rst), "max" if there is none."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.exists() else "max"


def memory_gb() -> float:
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit("memory.max")
    return round((installed if limit == "max" else min(installed, int(limit))) / 1e9, 1)


def threads() -> int:
    """OMP_NUM_THREADS if the user chose it, else this process's share of the physical cores."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
    chosen = os.environ.get("OMP_NUM_THREADS")
    # torchrun sets OMP_NUM_THREADS=1 when it is unset: under it, 1 is nobody's choice.
    if chosen and not (world_size > 1 and chosen == "1"):
        if not (chosen.isdecimal() and int(chosen) > 0):
            raise UserError(
                f"OMP_NUM_THREADS={chosen} is not a thread count: use a whole number from 1 up, or unset it"
            )
        return int(chosen)
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size))


def compiler_name() -> str:
    """The C++ compiler torch.compile will call: the same rule as torch._inductor.config.cpp.cxx."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    """Whether torch.compile can build its C++: a compiler that answers, and Python's headers, which it includes."""
    path = shutil.which(compiler_name())
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if path is None or not headers.exists():
        return False
    return subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0


def release_memory() -> None:
    """Give what a finished stage held back to the system: cycles are collected, and `prepare` had told malloc to keep all."""
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# -- measurements --------------------------------------------------------------------------------------------------


def describe() -> dict:
    """Facts that cost nothing to find out, ready for JSON (they go into `card.json`)."""
    rank, world_size = (int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": cores(),
        "memory_gb": memory_gb(),
        "instruction_sets": instruction_sets(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device()),
        "gpu": torch.cuda.get_device_name(device()) if device().type == "cuda" else None,
        "dtype": str(compute_dtype()).removeprefix("torch."),
        "threads": threads(),
        "rank": rank,
        "world_size": world_size,
        "compiler": has_compiler(),
    }


def timed(work: Callable[[], object], on: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if on.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], on: torch.device, seconds: float) -> float:
    """Median time of one call, over `seconds` and at least three calls, after one to warm up."""
    timed(work, on)
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(work, on))
    return statistics.median(times)


def matmul_gflops_per_second(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Peak of square matrix products, the limit of training; `seconds` of measuring.

    The size grows until about twenty products fill the time: small ones measure the overhead instead.
    """
    on = device()
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        a = torch.randn(size, size, device=on, dtype=dtype)
        work = partial(torch.mm, a, a, out=torch.empty_like(a))
        timed(work, on)
        if timed(work, on) > seconds / 20:
            break
    return 2 * size**3 / median_seconds(work, on, seconds) / 1e9


def bandwidth_gb_per_second(seconds: float = 1.0) -> float:
    """Rate of reading memory, the limit of decoding: the sum of 335 MB, more than most caches hold."""
    on = device()
    x = torch.ones(80 * 2**20, device=on)
    return x.nbytes / median_seconds(x.sum, on, seconds) / 1e9


def measure(seconds: float = 1.0) -> dict:
    """`describe()` and three measured rates, about `seconds` each."""
    return describe() | {
        "bf16_gflops_per_second": round(matmul_gflops_per_second(torch.bfloat16, seconds), 1),
        "fp32_gflops_per_second": round(matmul_gflops_per_second(torch.float32, seconds), 1),
        "bandwidth_gb_per_second": round(bandwidth_gb_per_second(seconds), 1),
    }
