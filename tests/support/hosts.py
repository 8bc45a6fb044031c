"""Two hosts on one machine: network namespaces, and between them a wire that is slow and loses packets.

The kernel here need not have netem: each namespace ends in a TUN device, and a process carries the IP packets from one to the
other, `delay` seconds late, dropping a share of them. TCP on both sides is the kernel's own and sends again what got lost.
"""

import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
HOSTS = ("ghost-a", "ghost-b")
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def possible() -> str:
    """Why there can be no two hosts here, or nothing."""
    if os.geteuid():
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    name = f"ghost-try-{os.getpid()}"  # all processes of the tests ask at once
    done = subprocess.run(f"ip netns add {name} && ip netns del {name}", shell=True, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no network namespaces: {done.stderr.strip()}"


def wire(delay: float, loss: float, seed: int = 0) -> int:
    """The id of a process that is both hosts' wire; `unplug` ends it."""
    ends = []
    for host, own, other in zip(HOSTS, ADDRESSES, reversed(ADDRESSES)):
        end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", host.encode(), IFF_TUN | IFF_NO_PI))
        ip("netns", "add", host)
        ip("link", "set", host, "netns", host)
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "addr", "add", own, "peer", other, "dev", host)
        ip("-n", host, "link", "set", host, "up")
        ends.append(end)
    process = os.fork()
    if not process:
        carry(ends, delay, loss, random.Random(seed))
    for end in ends:
        os.close(end)
    return process


def carry(ends: list[int], delay: float, loss: float, rng) -> None:
    """Until it is killed."""
    under_way: list[tuple] = []  # (when it arrives, number, where, packet)
    number = 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65536)
            if rng.random() >= loss:
                number += 1
                heapq.heappush(under_way, (time.monotonic() + delay, number, ends[1 - ends.index(end)], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, where, packet = heapq.heappop(under_way)
            os.write(where, packet)


def sent(host: str) -> int:
    """Bytes that a host has given to the wire."""
    return int(
        subprocess.run(
            ["ip", "netns", "exec", host, "cat", f"/sys/class/net/{host}/statistics/tx_bytes"],
            check=True,
            capture_output=True,
        ).stdout
    )


def unplug(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
