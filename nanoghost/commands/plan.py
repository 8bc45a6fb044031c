"""`nanoghost plan`: what a pretraining run takes, before anybody waits or pays for it.

Nothing here is a formula about a model. Parameters, optimizer and operations are counted on the real classes, on PyTorch's
meta device, where tensors have shapes and no memory; what autograd keeps for the backward pass is counted on a few toy
models and carried on to the size that is asked for. What is assumed: how much of a device's peak training reaches (SHARES),
how much of the wires' rate messages reach (REACHED), and what an hour costs.
"""

import json
import re
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.errors import UserError
from nanoghost.model.registry import check_arch, config_for_depth, new_model
from nanoghost.optim.collectives import communication_bytes
from nanoghost.optim.optimizer import Optimizer
from nanoghost.train.hyperparameters import depth_for, pretrain_groups


@dataclass(frozen=True)
class Hardware:
    tflops: float
    """Peak of dense bf16 products per device, TFLOP/s, of its data sheet (of `this`: measured)."""
    memory_gb: float
    """Of a device, 10^9 bytes."""
    dollars: float | None = None
    """For a device and an hour, where GPUs are rented (May 2026); None: not known."""
    link_gb: float = 25.0
    """Between devices of a node, 10^9 bytes a second each way, of the data sheet (NVLink; PCIe 4.0 where there is none)."""
    network_gb: float = 12.5
    """Between nodes, for each device: a card of 100 Gbit/s, or what nodes with this device usually come with."""


HARDWARE = {
    "b200": Hardware(2250, 192, None, 900, 50),
    "h200": Hardware(989, 141, 3.75, 450, 50),
    "h100": Hardware(989, 80, 2.95, 450, 50),
    "a100": Hardware(312, 80, 1.30, 300, 25),
    "l40s": Hardware(362, 48),
    "5090": Hardware(209, 32),
    "4090": Hardware(165, 24),
    "3090": Hardware(71, 24),
}
SHARES = {"gpu": 0.41, "cpu": 0.44}  # of the peak, over a whole step: docs/results/plans.md says from which runs
REACHED = 0.7  # of a link's rate, by large messages
MESSAGE = 10e-6  # seconds that a message takes to the next device, however short it is
NODE = 8  # devices
FULL = 0.9  # of a device's memory that a plan may use
DEPTHS = range(2, 41, 2)


@dataclass(frozen=True)
class PlanSettings:
    depth: int | None = None
    """The dial: layers. Default: what the minutes are best spent on, or depth 4."""
    minutes: float | None = None
    """How long training may take; default: until it has read `tokens_per_parameter`."""
    hardware: str = "this"
    """this (measured), or devices such as 8xH100, A100, 2x4090."""
    arch: str = "ghost"
    """ghost or llama."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; default: 4096 on this computer, 32768 on GPUs."""
    context: int | None = None
    """Tokens in a row; default: 256 on this computer, 2048 on GPUs."""
    batch_tokens: int | None = None
    """Tokens in a step, over all devices; default: 4096 on this computer, 524288 on GPUs."""
    tokens_per_parameter: float = 10.5
    """Tokens to read for each weight in matrix products, without --minutes."""
    share: float | None = None
    """Of the peak that training reaches; default: 0.41 on GPUs, 0.44 on CPUs."""
    dollars: float | None = None
    """For a device and an hour; default: from a small table, where it has a price."""
    json: bool = False
    """Print the plan as JSON on standard output."""


def command(settings: PlanSettings) -> None:
    hardware.prepare()
    figures = plan(settings)
    tell(figures)
    if settings.json:
        print(json.dumps(figures))


def plan(settings: PlanSettings) -> dict:
    """The plan, in the units that its keys carry."""
    check_arch(settings.arch)
    for name in (
        "depth",
        "minutes",
        "vocab_size",
        "context",
        "batch_tokens",
        "tokens_per_parameter",
        "share",
        "dollars",
    ):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {value}")
    devices, hardware, local = hardware_of(settings.hardware)
    gpu = not local or hardware.device().type == "cuda"
    vocab_size = settings.vocab_size or (32768 if gpu else 4096)
    context = settings.context or (2048 if gpu else 256)
    batch = max(1, (settings.batch_tokens or (524288 if gpu else 4096)) // context // devices) * devices  # rows
    share = settings.share or SHARES["gpu" if gpu else "cpu"]
    rate = devices * hardware.tflops * 1e12 * share  # useful operations a second

    def made(depth: int):
        config = config_for_depth(settings.arch, depth, vocab_size, context)
        with torch.device("meta"):
            model = new_model(config)
        counts, flops = model.parameter_counts(), model.flops_per_token(context)
        tokens = settings.tokens_per_parameter * (counts["matrices"] + counts["head"])
        return config, model, counts, flops, tokens

    depth, reason = settings.depth, "as asked"
    if depth is None and gpu and settings.minutes:
        fitting = [d for d in DEPTHS if (m := made(d))[3] * m[4] / rate <= settings.minutes * 60]
        depth, reason = (
            max(fitting, default=2),
            f"the deepest that reads its {settings.tokens_per_parameter:g} tokens a weight in time",
        )
    elif depth is None:
        depth, reason = depth_for(settings.minutes, hardware.tflops * 1e3)
    config, model, counts, flops, tokens = made(depth)
    if settings.minutes:
        tokens = rate * settings.minutes * 60 / flops
    steps = max(1, round(tokens / (batch * context)))
    tokens = steps * batch * context
    dtype = torch.bfloat16 if gpu else hardware.compute_dtype()
    parts = memory(model.cast(dtype), dtype, devices)
    sent, talk = communication(model, dtype, devices, hardware)
    # within a node it is part of the share: the runs that the share was taken from talked as much
    extra = talk - communication(model, dtype, NODE, hardware)[1] if devices > NODE else 0.0
    if settings.minutes and extra:
        steps = max(1, round(settings.minutes * 60 / (batch * context * flops / rate + extra)))
        tokens = steps * batch * context
    seconds = tokens * flops / rate + steps * extra
    row = activation_bytes(settings.arch, config, dtype)
    update = parts.pop("largest update")  # when activations are gone
    room = FULL * hardware.memory_gb * 1e9 - sum(parts.values())
    per_device = batch // devices
    micro = max((n for n in range(1, per_device + 1) if per_device % n == 0 and n * row <= room), default=1)
    parts |= {"activations": micro * row, "largest update": update}
    most = sum(parts.values()) - min(micro * row, update)
    dollars = settings.dollars or hardware.dollars
    hours = seconds / 3600
    return {
        "hardware": f"{devices}x{settings.hardware.rpartition('x')[2]}" if not local else "this", "arch": settings.arch,
        "depth": depth, "depth_reason": reason, "width": config.width, "vocab_size": vocab_size, "context": context,
        "parameters": sum(counts.values()), "parameter_counts": counts, "tokens": tokens, "steps": steps, "batch": batch,
        "micro_batch": micro, "flops_per_token": flops, "flops": tokens * flops, "peak_tflops_per_second": devices * hardware.tflops,
        "share_of_peak": share, "tokens_per_second": tokens / seconds, "seconds": seconds,
        "step_seconds": seconds / steps, "communication_bytes_per_step": sent, "communication_seconds_per_step": talk,
        "memory_bytes_per_device": {k: round(v) for k, v in parts.items()}, "memory_bytes": round(most),
        "device_memory_gb": hardware.memory_gb, "fits": most <= FULL * hardware.memory_gb * 1e9,
        "dollars": round(hours * devices * dollars, 2) if dollars and not local else None,
        "command": pretrain_command(settings.arch, depth, steps, batch, context, micro, vocab_size, devices),
    }  # fmt: skip


def hardware_of(name: str) -> tuple[int, Hardware, bool]:
    """(devices, one of them, whether it is this computer) of "8xH100" or "this"."""
    if name == "this":
        dtype = hardware.compute_dtype()
        return 1, Hardware(hardware.matmul_gflops_per_second(dtype) / 1e3, memory_gb()), True
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+)", name, re.IGNORECASE)
    if not found or found[2].lower() not in HARDWARE:
        raise UserError(f"--hardware knows this, and {', '.join(HARDWARE)}, with a count such as 8xH100; not '{name}'")
    return int(found[1] or 1), HARDWARE[found[2].lower()], False


def memory_gb() -> float:
    """Of the device that this process computes on."""
    on = hardware.device()
    return torch.cuda.get_device_properties(on).total_memory / 1e9 if on.type == "cuda" else hardware.memory_gb()


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def memory(model, dtype: torch.dtype, devices: int) -> dict[str, int]:
    """Bytes on each of `devices`, but for the activations; `model` is in the compute dtype, on the meta device."""
    optimizer = Optimizer(model, pretrain_groups(model.config.width), dtype, 0, devices)
    buckets = optimizer.buckets.values()
    weights = sum(size([b.params]) for b in buckets) + size(model.buffers())
    # while a bucket is updated: Muon works on four copies of its shard, AdamW on two; the gradients of all are on their way, in fp32
    largest = max(4 * b.master.numel() * (4 if b.is_muon else 2) for b in buckets)
    largest += 4 * sum(b.params.numel() for b in buckets) * (devices > 1)
    return {
        "weights": weights, "gradients": sum(size([b.params]) for b in buckets),
        "optimizer": sum(size(b.state().values()) for b in buckets), "largest update": largest,
    }  # fmt: skip


def communication(model, dtype: torch.dtype, devices: int, hardware: Hardware) -> tuple[int, float]:
    """Bytes that a device sends in a step, and the seconds that this takes: gradients in fp32, then weights (optim/ranks.py).

    As rings do it: at the rate of the slowest link between neighbours, and once around for each bucket and direction. None of it
    is hidden behind the backward pass.
    """
    if devices == 1:
        return 0, 0.0
    buckets = Optimizer(model, pretrain_groups(model.config.width), dtype, 0, devices).buckets.values()
    sent = communication_bytes(buckets, devices)
    total = sent["gradients (nccl)"] + sent["weights"]
    rate = (hardware.link_gb if devices <= NODE else min(hardware.link_gb, hardware.network_gb)) * 1e9 * REACHED
    return total, total / rate + 2 * len(buckets) * (devices - 1) * MESSAGE


TOYS = (
    (2, 64, 512),
    (4, 64, 512),
    (6, 96, 768),
    (2, 128, 512),
    (2, 64, 1024),
    (4, 128, 1024),
)  # depth, context, vocabulary


def activation_bytes(arch: str, config, dtype: torch.dtype) -> float:
    """What autograd keeps of one row of `config.context` tokens, bytes.

    For a token: a share for each layer and unit of width, one for each unit of width, of context, of the vocabulary, and a
    constant. The five are solved for from toy models.
    """

    def sizes(c):
        return [c.depth * c.width, c.width, c.context, c.vocab_size, 1.0]

    toys = [config_for_depth(arch, depth, vocab_size, context) for depth, context, vocab_size in TOYS]
    found = torch.tensor([[kept(toy, dtype) / toy.context] for toy in toys], dtype=torch.float64)
    shares = torch.linalg.lstsq(torch.tensor([sizes(toy) for toy in toys], dtype=torch.float64), found).solution[:, 0]
    return (torch.tensor(sizes(config), dtype=torch.float64) @ shares).item() * config.context


def kept(config, dtype: torch.dtype, rows: int = 2) -> float:
    """Bytes that autograd keeps of a row of a real forward pass, without the parameters themselves; counted once each."""
    torch.manual_seed(0)
    model = new_model(config).cast(dtype)
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    tokens = torch.randint(config.vocab_size, (rows, config.context + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.logprobs(tokens[:, :-1], tokens[:, 1:]).sum()
    del loss  # until here it kept them, so that none of the addresses was given away twice
    return sum(seen.values()) / rows


def pretrain_command(arch, depth, steps, batch, context, micro, vocab_size, devices) -> str:
    nodes = -(-devices // NODE)
    start = "nanoghost"
    if devices > 1:
        several = f"--nnodes={nodes} --rdzv-endpoint=HOST:29500 " if nodes > 1 else "--standalone "
        start = f"torchrun {several}--nproc-per-node={min(devices, NODE)} -m nanoghost"
    return (
        f"{start} pretrain --arch {arch} --depth {depth} --steps {steps} --batch {batch} --micro-batch {micro}"
        f" --context {context} --vocab-size {vocab_size}"
    )


# ── for eyes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def tell(p: dict) -> None:
    table = Table(title=f"{p['arch']}, depth {p['depth']}, on {p['hardware']}", title_justify="left", show_header=False)
    inner = p["parameter_counts"]["matrices"] + p["parameter_counts"]["head"]
    table.add_row("depth", f"{p['depth']}, width {p['width']}", p["depth_reason"])
    table.add_row(
        "parameters", count(p["parameters"]), f"{count(inner)} of them in matrix products; the others are looked up"
    )
    table.add_row(
        "tokens",
        count(p["tokens"]),
        f"{p['steps']:,} steps of {p['batch']:,} x {p['context']:,}, {p['tokens'] / inner:.3g} for each weight in products",
    )
    table.add_row(
        "operations",
        f"{p['flops']:.3g}",
        f"{count(p['flops_per_token'])} for a token: products and causal attention, forward and backward",
    )
    peak = (
        f"{p['peak_tflops_per_second']:,.0f} TFLOP/s"
        if p["hardware"] != "this"
        else f"{p['peak_tflops_per_second'] * 1e3:,.0f} GFLOP/s, measured"
    )
    table.add_row(
        "time",
        duration(p["seconds"]),
        f"{count(p['tokens_per_second'])} tokens/s, if {p['share_of_peak']:.0%} of the peak ({peak}) are reached",
    )
    if p["communication_bytes_per_step"]:
        table.add_row(
            "a step",
            f"{p['step_seconds'] * 1e3:,.0f} ms",
            f"of which gradients and weights travel {p['communication_seconds_per_step'] * 1e3:,.1f} ms, {amount(p['communication_bytes_per_step'])} from each device",
        )
    for part, n in p["memory_bytes_per_device"].items():
        why = {
            "activations": f"of {p['micro_batch']:,} rows at once (--micro-batch)",
            "largest update": "when activations are gone",
        }.get(part, "")
        table.add_row(part, amount(n), why)
    fits = f"of {p['device_memory_gb']:g} GB on each device" + (
        "" if p["fits"] else ": DOES NOT FIT, not even a row at a time"
    )
    table.add_row("memory", amount(p["memory_bytes"]), fits)
    if p["dollars"] is not None:
        table.add_row("cost", f"${p['dollars']:,.2f}", "rented by the hour (--dollars for your price)")
    Console(stderr=True, width=max(100, Console(stderr=True).width)).print(table)
    Console(stderr=True, soft_wrap=True).print(p["command"], highlight=False)


def count(n: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:.3g}{letter}"
    return f"{n:.3g}"


def amount(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e9 else f"{n / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"
