"""Several ranks in little time: a process that has imported everything forks them. python -m tests.support.ranks MODULE:FUNCTION 2,3 ARGUMENT

Forked before anything has been computed, so nothing of torch's threads is lost on the way.
"""

import importlib
import os
import socket
import subprocess
import sys
import traceback


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fork_ranks(world: int, function, *arguments) -> list[int]:
    """Processes 0 to `world` - 1, as torchrun announces them, at work on `function(*arguments)`: their ids."""
    port = free_port()
    found = []
    for rank in range(world):
        child = os.fork()
        if child:
            found.append(child)
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
        try:
            function(*arguments)
            code = 0
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return found


def codes_of(processes: list[int]) -> list[int]:
    """Exit codes; of the killed, minus the signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]


def in_ranks(function: str, worlds, argument, timeout: float = 600) -> None:
    """Run MODULE:FUNCTION in as many processes as each of `worlds` says, one world after the other."""
    command = [sys.executable, "-m", "tests.support.ranks", function, ",".join(map(str, worlds)), str(argument)]
    done = subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    scenario = getattr(importlib.import_module(module), name)
    for size in sys.argv[2].split(","):
        codes = codes_of(fork_ranks(int(size), scenario, sys.argv[3]))
        assert not any(codes), codes
