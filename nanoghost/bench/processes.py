"""Processes and their memory, from /proc (Linux)."""

import contextlib
import os
import re
from pathlib import Path


def process_tree(pid: int) -> list[int]:
    """A process and its descendants."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
            parents[int(name)] = int(f.read().rpartition(")")[2].split()[1])
    tree = [pid]
    for ancestor in tree:  # grows meanwhile
        tree += [child for child, parent in parents.items() if parent == ancestor]
    return tree


def memory_megabytes(pid: int) -> float:
    """Resident memory; 0 if the process has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def group_memory_bytes(group: int) -> int:
    """Memory of a process group; what its processes share counts once (proportional set size)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                smaps = (folder / "smaps_rollup").read_text()
                total += int(re.search(r"^Pss: *(\d+) kB", smaps, re.M)[1]) * 1024
        except (ProcessLookupError, FileNotFoundError, PermissionError, TypeError):  # the process has ended meanwhile
            continue
    return total
