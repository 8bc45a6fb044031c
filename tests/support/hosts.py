"""Two hosts on one machine: network namespaces, connected by a slow link that loses packets.

The kernel need not have netem: each namespace has a TUN device, and a process carries the IP packets from one device to
the other, `delay` seconds late, and drops some of them. TCP is the kernel's own on both sides and retransmits.
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


def why_impossible() -> str:
    """Why this machine cannot have two hosts, or ""."""
    if os.geteuid():
        return "network namespaces need root"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    name = f"ghost-try-{os.getpid()}"  # several test processes may try at the same time
    done = subprocess.run(f"ip netns add {name} && ip netns del {name}", shell=True, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no network namespaces: {done.stderr.strip()}"


def connect(delay: float, loss: float, seed: int = 0) -> int:
    """Create both hosts; returns the id of the process that links them. `disconnect` ends it and removes the hosts."""
    devices = []
    for host, address, peer in zip(HOSTS, ADDRESSES, reversed(ADDRESSES)):
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", host.encode(), IFF_TUN | IFF_NO_PI))
        ip("netns", "add", host)
        ip("link", "set", host, "netns", host)
        ip("-n", host, "link", "set", "lo", "up")
        ip("-n", host, "addr", "add", address, "peer", peer, "dev", host)
        ip("-n", host, "link", "set", host, "up")
        devices.append(device)
    process = os.fork()
    if not process:
        carry_packets(devices, delay, loss, random.Random(seed))
    for device in devices:
        os.close(device)
    return process


def carry_packets(devices: list[int], delay: float, loss: float, rng: random.Random) -> None:
    """Carry packets between the two devices until this process is killed."""
    in_flight: list[tuple] = []  # a heap of (arrival time, number, device, packet)
    number = 0
    while True:
        wait = max(0.0, in_flight[0][0] - time.monotonic()) if in_flight else None
        for device in select.select(devices, [], [], wait)[0]:
            packet = os.read(device, 65536)
            if rng.random() >= loss:
                number += 1
                other = devices[1 - devices.index(device)]
                heapq.heappush(in_flight, (time.monotonic() + delay, number, other, packet))
        while in_flight and in_flight[0][0] <= time.monotonic():
            _, _, device, packet = heapq.heappop(in_flight)
            os.write(device, packet)


def bytes_sent(host: str) -> int:
    """Bytes that a host has sent over the link."""
    counter = f"/sys/class/net/{host}/statistics/tx_bytes"
    done = subprocess.run(["ip", "netns", "exec", host, "cat", counter], check=True, capture_output=True)
    return int(done.stdout)


def disconnect(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)
