"""What this computer can do: device, dtype, threads, memory, throughput. `nanoghost doctor` shows all of it.

Nothing happens at import. A stage calls `prepare()` once, before its first large tensor.
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

# CPU features that determine the speed of training and of quantized decoding (names as in torch.cpu.get_capabilities)
CPU_FEATURES = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "dot",
    "i8mm",
    "bf16",
    "sve",
)


# -- setup ------------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Set up this process for training or inference; every stage calls it once, before its first large tensor."""
    # Small gradients and optimizer moments become denormals, which many CPUs compute in slow microcode. The flag
    # belongs to a thread and is inherited by the threads it starts: set it before the first parallel operation.
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads())
    # oneDNN caches the code it generates for each matmul shape, 1024 of them by default. Generation has new shapes with
    # every token, and the cache grew to a gigabyte in half an hour (measured). oneDNN reads this at its first matmul.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    if platform.libc_ver()[0] == "glibc":
        # glibc serves a large block with a new mmap and unmaps it when it is freed, so every large tensor costs page
        # faults, 4 KB at a time. Without mmap and trimming, blocks are reused: elementwise operations in training
        # are 3x faster (measured). The price: a process keeps its peak memory until it ends.
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_memory() -> None:
    """Return the memory of a finished stage to the system, which `prepare` told malloc not to do by itself."""
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# -- properties -------------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """The device of this process: its CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise UserError(
                f"process {index} of this node has no GPU: start at most {torch.cuda.device_count()} processes"
            )
        return torch.device("cuda", index)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def instruction_sets() -> list[str]:
    """The features of CPU_FEATURES that this CPU has."""
    capabilities = torch.cpu.get_capabilities()
    return [name for name in CPU_FEATURES if capabilities.get(name)]


def cpu_dtype(features: Collection[str]) -> torch.dtype:
    """bfloat16 where the CPU multiplies it in hardware, else float32 (emulated bf16 is slower than fp32)."""
    return torch.bfloat16 if "avx512_bf16" in features or "amx_bf16" in features else torch.float32


def compute_dtype(target: torch.device | None = None) -> torch.dtype:
    """Dtype of matmuls; master weights are float32. Never fp16: its small range needs loss scaling."""
    target = target or device()
    if target.type == "cpu":
        return cpu_dtype(instruction_sets())
    if target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def cores() -> int:
    """Physical cores that this process may use, given its CPU affinity and the quota of its container."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return torch.cpu.get_capabilities()["num_physical_cores"]
    available = os.sched_getaffinity(0)
    sibling_files = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in available]
    if all(path.exists() for path in sibling_files):
        count = len({path.read_text() for path in sibling_files})  # hyperthreads of a core have the same list
    else:  # some sandboxes hide the files
        count = len(available)
    quota, _, period = container_limit("cpu.max").partition(" ")
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def container_limit(name: str) -> str:
    """A limit of this container (cgroup v2, see the kernel's cgroup-v2.rst); "max" without a limit."""
    path = Path("/sys/fs/cgroup") / name
    return path.read_text().strip() if path.exists() else "max"


def memory_gb() -> float:
    """Installed memory, or the limit of the container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = container_limit("memory.max")
    if limit != "max":
        memory = min(memory, int(limit))
    return round(memory / 1e9, 1)


def threads() -> int:
    """OMP_NUM_THREADS if the user has set it, else the physical cores divided by the processes of this node."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun sets it
    requested = os.environ.get("OMP_NUM_THREADS")
    set_by_torchrun = world_size > 1 and requested == "1"  # its default if the variable is unset
    if requested and not set_by_torchrun:
        if not (requested.isdecimal() and int(requested) > 0):
            raise UserError(f"OMP_NUM_THREADS={requested} must be a whole number of at least 1, or unset")
        return int(requested)
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or world_size))


def compiler_name() -> str:
    """The C++ compiler that torch.compile calls: the same rule as torch._inductor.config.cpp.cxx."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def has_compiler() -> bool:
    """Whether torch.compile can build C++: it needs a compiler that runs, and the headers of Python."""
    path = shutil.which(compiler_name())
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if path is None or not headers.exists():
        return False
    return subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0


def describe() -> dict:
    """The properties of this machine, as `card.json` stores them."""
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
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "compiler": has_compiler(),
    }


# -- measurements -----------------------------------------------------------------------------------------------------


def time_call(work: Callable[[], object], target: torch.device) -> float:
    """Seconds of one call, until the device has finished."""
    start = time.perf_counter()
    work()
    if target.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def median_seconds(work: Callable[[], object], target: torch.device, seconds: float) -> float:
    """Median time of one call, over `seconds` and at least three calls, after one warm-up call."""
    time_call(work, target)
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(time_call(work, target))
    return statistics.median(times)


def matmul_gflops_per_second(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Peak throughput of square matmuls, the limit of training, measured for `seconds`.

    The size grows until about twenty matmuls fill the time: small ones would measure the overhead.
    """
    target = device()
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        a = torch.randn(size, size, device=target, dtype=dtype)
        work = partial(torch.mm, a, a, out=torch.empty_like(a))
        time_call(work, target)
        if time_call(work, target) > seconds / 20:
            break
    return 2 * size**3 / median_seconds(work, target, seconds) / 1e9


def bandwidth_gb_per_second(seconds: float = 1.0) -> float:
    """Bandwidth of reading memory, the limit of decoding: the sum of 335 MB, more than most caches hold."""
    target = device()
    x = torch.ones(80 * 2**20, device=target)
    return x.nbytes / median_seconds(x.sum, target, seconds) / 1e9


def measure(seconds: float = 1.0) -> dict:
    """`describe()` and three measurements of about `seconds` each."""
    return describe() | {
        "bf16_gflops_per_second": round(matmul_gflops_per_second(torch.bfloat16, seconds), 1),
        "fp32_gflops_per_second": round(matmul_gflops_per_second(torch.float32, seconds), 1),
        "bandwidth_gb_per_second": round(bandwidth_gb_per_second(seconds), 1),
    }
