"""Hardware that `nanoghost plan` knows: peak FLOP/s, memory, links and prices, and what fraction training reaches."""

import re
from dataclasses import dataclass

import torch

from nanoghost import hardware
from nanoghost.errors import UserError

MFU = {"gpu": 0.41, "cpu": 0.44}  # of whole steps; docs/results/plans.md lists the runs that this comes from
LINK_EFFICIENCY = 0.7  # fraction of a link's bandwidth that large messages reach
MESSAGE_LATENCY = 10e-6  # seconds that a message of any size takes to the next device
DEVICES_PER_NODE = 8
USABLE_MEMORY = 0.9  # fraction of a device's memory that a plan may fill


@dataclass(frozen=True)
class DeviceSpec:
    """One device: a GPU, or all cores of this computer."""

    tflops: float
    """Peak of dense bf16 matmuls, TFLOP/s, from the data sheet (for `this`: measured)."""
    memory_gb: float
    """Memory in 10^9 bytes."""
    dollars: float | None = None
    """Price of an hour where GPUs are rented (May 2026); None: unknown."""
    link_gb: float = 25.0
    """Bandwidth to the devices of the same node, 10^9 bytes/s each way, from the data sheet (NVLink, else PCIe 4.0)."""
    network_gb: float = 12.5
    """Bandwidth to other nodes per device, 10^9 bytes/s: a 100 Gbit/s card, or what is usual with this device."""


DEVICES = {  # TFLOP/s, memory, dollars, bandwidth in the node, bandwidth to other nodes
    "b200": DeviceSpec(2250, 192, None, 900, 50),
    "h200": DeviceSpec(989, 141, 3.75, 450, 50),
    "h100": DeviceSpec(989, 80, 2.95, 450, 50),
    "a100": DeviceSpec(312, 80, 1.30, 300, 25),
    "l40s": DeviceSpec(362, 48),
    "5090": DeviceSpec(209, 32),
    "4090": DeviceSpec(165, 24),
    "3090": DeviceSpec(71, 24),
}


@dataclass(frozen=True)
class Cluster:
    """`count` equal devices."""

    name: str
    count: int
    device: DeviceSpec
    is_this: bool
    """Whether it is this computer, whose speed is measured."""
    is_gpu: bool


def parse_hardware(text: str) -> Cluster:
    """The cluster that --hardware names: "this", "A100", "8xH100". Raises UserError for unknown hardware."""
    if text == "this":
        tflops = hardware.matmul_gflops_per_second(hardware.compute_dtype()) / 1e3
        device = DeviceSpec(tflops, device_memory_gb())
        return Cluster("this", 1, device, is_this=True, is_gpu=hardware.device().type == "cuda")
    match = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)", text, re.IGNORECASE)
    if not match or match[2].lower() not in DEVICES:
        names = ", ".join(["this", *DEVICES])
        raise UserError(f"--hardware: unknown hardware '{text}'; choose from {names}, with a count such as 8xH100")
    count = int(match[1] or 1)
    return Cluster(f"{count}x{match[2]}", count, DEVICES[match[2].lower()], is_this=False, is_gpu=True)


def device_memory_gb() -> float:
    """Memory of the device that this process computes on, in 10^9 bytes."""
    device = hardware.device()
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return hardware.memory_gb()


def transfer_seconds(sent_bytes: int, messages: int, cluster: Cluster) -> float:
    """Time of ring collectives in which each device sends `sent_bytes`, in `messages` collectives.

    The slowest link between neighbors limits the bandwidth; each message passes once around the ring.
    """
    if cluster.count == 1:
        return 0.0
    device = cluster.device
    gb_per_second = device.link_gb if cluster.count <= DEVICES_PER_NODE else min(device.link_gb, device.network_gb)
    latency = messages * (cluster.count - 1) * MESSAGE_LATENCY
    return sent_bytes / (gb_per_second * 1e9 * LINK_EFFICIENCY) + latency
