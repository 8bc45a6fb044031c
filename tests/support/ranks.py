"""Several ranks quickly: a process that has imported everything forks them.

    python -m tests.support.ranks MODULE:FUNCTION 2,3 ARGUMENT

The process must not have computed anything before: torch's threads do not survive a fork.
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


def fork_ranks(world_size: int, function, *arguments) -> list[int]:
    """Fork `world_size` processes that call `function(*arguments)` in the environment of torchrun; their ids."""
    port = free_port()
    processes = []
    for rank in range(world_size):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        os._exit(exit_code(function, arguments))
    return processes


def exit_code(function, arguments) -> int:
    """Call a function; returns the code with which a process that called it would exit."""
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
    return code


def codes_of(processes: list[int]) -> list[int]:
    """Wait for the processes; returns their exit codes, minus the signal for those that were killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def in_ranks(function: str, world_sizes, argument, timeout: float = 600) -> None:
    """Run MODULE:FUNCTION with each of the world sizes, one after the other, in a new process."""
    sizes = ",".join(map(str, world_sizes))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ranks", function, sizes, str(argument)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    scenario = getattr(importlib.import_module(module), name)
    for size in sys.argv[2].split(","):
        codes = codes_of(fork_ranks(int(size), scenario, sys.argv[3]))
        assert not any(codes), codes
