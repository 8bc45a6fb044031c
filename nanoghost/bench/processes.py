"""Processes and their memory, from /proc (Linux)."""

import contextlib
import os
import re
from pathlib import Path


def process_tree(pid: int) -> list[int]:
    """A process and its descendants, a generation at a time."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
            fields_after_name = f.read().rpartition(")")[2].split()  # state, parent, ...
            parents[int(name)] = int(fields_after_name[1])
    tree = []
    generation = [pid]
    while generation:
        tree += generation
        generation = [child for child, parent in parents.items() if parent in generation]
    return tree


def memory_megabytes(pid: int) -> float:
    """Resident memory; 0 if the process has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def group_memory_bytes(group: int) -> int:
    """Memory of a process group. Memory that its processes share counts once (proportional set size)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):  # a process that just ended
            if os.getpgid(int(folder.name)) == group:
                smaps = (folder / "smaps_rollup").read_text()
                if match := re.search(r"^Pss: *(\d+) kB", smaps, re.M):
                    total += int(match[1]) * 1024
    return total
