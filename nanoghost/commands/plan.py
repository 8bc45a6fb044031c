"""`nanoghost plan`: time, memory and cost of a pretraining run, before anybody waits or pays for it.

It contains no formula about a model: parameters, FLOPs and optimizer states are counted on the real classes, on
PyTorch's meta device, where tensors have shapes and no memory. The assumptions (MFU, link efficiency, prices) are in
plan_hardware.py.
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace

import torch
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.plan_hardware import DEVICES_PER_NODE, MFU, Cluster, parse_hardware, transfer_seconds
from nanoghost.commands.plan_memory import activation_bytes, meta_optimizer, plan_memory
from nanoghost.errors import UserError
from nanoghost.model.interface import ModelConfig
from nanoghost.model.registry import config_for_depth, new_model
from nanoghost.optim.collectives import communication_bytes
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import JsonFlag
from nanoghost.train.hyperparameters import depth_for, usable_gflops_per_second

DEPTHS = range(2, 41, 2)  # depths that --minutes on GPUs chooses from


@dataclass(frozen=True)
class DefaultSettings:
    """Settings that depend on the kind of device."""

    vocab_size: int
    context: int
    batch_tokens: int
    mfu: float


CPU_DEFAULTS = DefaultSettings(vocab_size=4096, context=256, batch_tokens=4096, mfu=MFU["cpu"])
GPU_DEFAULTS = DefaultSettings(vocab_size=32768, context=2048, batch_tokens=524288, mfu=MFU["gpu"])


@dataclass(frozen=True)
class PlanSettings(JsonFlag):
    depth: int | None = None
    """The dial: number of layers. Default: the best for the minutes, or 4."""
    minutes: float | None = None
    """Training time. Default: as long as --tokens-per-parameter takes."""
    hardware: str = "this"
    """this (measured), or devices such as 8xH100, A100, 2x4090."""
    arch: str = "ghost"
    """ghost or llama."""
    vocab_size: int | None = None
    """Tokens of the vocabulary. Default: 4096 on CPUs, 32768 on GPUs."""
    context: int | None = None
    """Tokens in a row. Default: 256 on CPUs, 2048 on GPUs."""
    batch_tokens: int | None = None
    """Tokens in a step, over all devices. Default: 4096 on CPUs, 524288 on GPUs."""
    tokens_per_parameter: float = 10.5
    """Training tokens for each weight in matmuls, without --minutes."""
    mfu: float | None = None
    """Model FLOPs utilization: fraction of the peak that training reaches. Default: 0.41 on GPUs, 0.44 on CPUs."""
    dollars: float | None = None
    """Price of one device for an hour. Default: from a small table, if it has the device."""


@dataclass(frozen=True)
class SizedModel:
    """A model of one depth, on the meta device."""

    config: ModelConfig
    model: torch.nn.Module
    parameter_counts: dict[str, int]
    flops_per_token: float
    training_tokens: float
    """Tokens to train on without --minutes."""


@dataclass(frozen=True)
class Plan:
    """A planned run; units are in the names. The fields are the keys of --json."""

    hardware: str
    arch: str
    depth: int
    depth_reason: str
    width: int
    vocab_size: int
    context: int
    parameters: int
    parameter_counts: dict[str, int]
    tokens: int
    steps: int
    batch: int
    """Rows in a step, over all devices."""
    micro_batch: int
    """Rows that fit through the model at once on each device."""
    flops_per_token: float
    flops: float
    peak_tflops_per_second: float
    mfu: float
    tokens_per_second: float
    seconds: float
    step_seconds: float
    communication_bytes_per_step: int
    communication_seconds_per_step: float
    memory_bytes_per_device: dict[str, int]
    memory_bytes: int
    """Peak on each device."""
    device_memory_gb: float
    fits: bool
    dollars: float | None
    command: str
    """The command that runs it."""


def command(settings: PlanSettings) -> None:
    hardware.prepare()
    plan = make_plan(settings)
    print_plan(plan)
    if settings.json:
        print(json.dumps(asdict(plan)))


def make_plan(settings: PlanSettings) -> Plan:
    """Plan a run. Raises UserError for settings that are out of range and for unknown hardware."""
    check_settings(settings)
    cluster = parse_hardware(settings.hardware)
    num_devices, device = cluster.count, cluster.device
    defaults = default_settings(cluster)
    mfu = settings.mfu or defaults.mfu
    flops_per_second = num_devices * device.tflops * 1e12 * mfu
    sized, depth_reason = choose_model(settings, cluster, flops_per_second)
    context = sized.config.context
    rows = (settings.batch_tokens or defaults.batch_tokens) // context
    batch = max(1, rows // num_devices) * num_devices  # each device gets the same number of rows

    dtype = torch.bfloat16 if cluster.is_gpu else hardware.compute_dtype()
    model = sized.model.cast(dtype)
    optimizer = meta_optimizer(model, dtype, num_devices)
    communicated_bytes, communication_seconds = communication_cost(optimizer, cluster)
    inter_node_seconds = 0.0
    if num_devices > DEVICES_PER_NODE:
        # The MFU was measured on single nodes, so it includes the communication inside a node.
        node = replace(cluster, count=DEVICES_PER_NODE)
        _, node_seconds = communication_cost(meta_optimizer(model, dtype, DEVICES_PER_NODE), node)
        inter_node_seconds = communication_seconds - node_seconds

    step_tokens = batch * context
    step_seconds = step_tokens * sized.flops_per_token / flops_per_second + inter_node_seconds
    steps = settings.minutes * 60 / step_seconds if settings.minutes else sized.training_tokens / step_tokens
    steps = max(1, round(steps))
    row_bytes = activation_bytes(settings.arch, sized.config, dtype)
    memory = plan_memory(model, optimizer, cluster, row_bytes, batch // num_devices)
    price = None if cluster.is_this else settings.dollars or device.dollars
    dollars = round(steps * step_seconds / 3600 * num_devices * price, 2) if price else None
    return Plan(
        hardware=cluster.name,
        arch=settings.arch,
        depth=sized.config.depth,
        depth_reason=depth_reason,
        width=sized.config.width,
        vocab_size=sized.config.vocab_size,
        context=context,
        parameters=sum(sized.parameter_counts.values()),
        parameter_counts=sized.parameter_counts,
        tokens=steps * step_tokens,
        steps=steps,
        batch=batch,
        micro_batch=memory.micro_batch,
        flops_per_token=sized.flops_per_token,
        flops=steps * step_tokens * sized.flops_per_token,
        peak_tflops_per_second=num_devices * device.tflops,
        mfu=mfu,
        tokens_per_second=step_tokens / step_seconds,
        seconds=steps * step_seconds,
        step_seconds=step_seconds,
        communication_bytes_per_step=communicated_bytes,
        communication_seconds_per_step=communication_seconds,
        memory_bytes_per_device=memory.parts,
        memory_bytes=memory.peak,
        device_memory_gb=device.memory_gb,
        fits=memory.fits,
        dollars=dollars,
        command=pretrain_command(settings.arch, sized.config, steps, batch, memory.micro_batch, num_devices),
    )


def check_settings(settings: PlanSettings) -> None:
    if settings.arch not in ("ghost", "llama"):
        raise UserError(f"--arch must be ghost or llama, not '{settings.arch}'")
    for field in fields(settings):
        value = getattr(settings, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and not value > 0:  # NaN is not > 0 either
            raise UserError(f"--{field.name.replace('_', '-')} must be more than 0, not {value}")


def default_settings(cluster: Cluster) -> DefaultSettings:
    return GPU_DEFAULTS if cluster.is_gpu else CPU_DEFAULTS


def choose_model(settings: PlanSettings, cluster: Cluster, flops_per_second: float) -> tuple[SizedModel, str]:
    """(model, reason for its depth): the depth of the settings, or the best one for the time."""
    if settings.depth:
        return sized_model(settings, cluster, settings.depth), "as requested"
    if cluster.is_gpu and settings.minutes:
        deepest = sized_model(settings, cluster, min(DEPTHS))
        for depth in DEPTHS:
            sized = sized_model(settings, cluster, depth)
            if sized.flops_per_token * sized.training_tokens / flops_per_second <= settings.minutes * 60:
                deepest = sized
        return deepest, f"the deepest that reaches {settings.tokens_per_parameter:g} tokens per matmul weight in time"
    depth, reason = depth_for(settings.minutes, usable_gflops_per_second(cluster.device.tflops * 1e3))
    return sized_model(settings, cluster, depth), reason


def sized_model(settings: PlanSettings, cluster: Cluster, depth: int) -> SizedModel:
    defaults = default_settings(cluster)
    context = settings.context or defaults.context
    config = config_for_depth(settings.arch, depth, settings.vocab_size or defaults.vocab_size, context)
    with torch.device("meta"):
        model = new_model(config)
    counts = model.parameter_counts()
    training_tokens = settings.tokens_per_parameter * (counts["matrices"] + counts["head"])
    return SizedModel(config, model, counts, model.flops_per_token(context), training_tokens)


def communication_cost(optimizer: Optimizer, cluster: Cluster) -> tuple[int, float]:
    """(bytes that a device sends in a step, seconds): gradients in fp32, then weights; not overlapped with compute."""
    if cluster.count == 1:
        return 0, 0.0
    buckets = optimizer.buckets.values()
    bytes_by_content = communication_bytes(buckets, cluster.count)
    total = bytes_by_content["gradients (nccl)"] + bytes_by_content["weights"]
    return total, transfer_seconds(total, 2 * len(buckets), cluster)


def pretrain_command(arch: str, config: ModelConfig, steps: int, batch: int, micro_batch: int, num_devices: int) -> str:
    """The command line of the planned run; HOST stands for the address of the first node."""
    nodes = math.ceil(num_devices / DEVICES_PER_NODE)
    program = "nanoghost"
    if num_devices > 1:
        rendezvous = f"--nnodes={nodes} --rdzv-endpoint=HOST:29500" if nodes > 1 else "--standalone"
        processes = min(num_devices, DEVICES_PER_NODE)
        program = f"torchrun {rendezvous} --nproc-per-node={processes} -m nanoghost"
    return (
        f"{program} pretrain --arch {arch} --depth {config.depth} --steps {steps} --batch {batch}"
        f" --micro-batch {micro_batch} --context {config.context} --vocab-size {config.vocab_size}"
    )


# -- display -----------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    table = Table(title=f"{plan.arch}, depth {plan.depth}, on {plan.hardware}", title_justify="left", show_header=False)
    for row in plan_rows(plan):
        table.add_row(*row)
    Console(stderr=True, width=max(100, Console(stderr=True).width)).print(table)
    Console(stderr=True, soft_wrap=True).print(plan.command, highlight=False)


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """Rows (name, figure, explanation)."""
    in_matmuls = plan.parameter_counts["matrices"] + plan.parameter_counts["head"]
    peak = f"{plan.peak_tflops_per_second:,.0f} TFLOP/s"
    if plan.hardware == "this":
        peak = f"{plan.peak_tflops_per_second * 1e3:,.0f} GFLOP/s, measured"
    step_rows = f"{plan.steps:,} steps of {plan.batch:,} x {plan.context:,}"
    rows = [
        ("depth", f"{plan.depth}, width {plan.width}", plan.depth_reason),
        (
            "parameters",
            format_count(plan.parameters),
            f"{format_count(in_matmuls)} of them in matmuls; the others are embeddings",
        ),
        ("tokens", format_count(plan.tokens), f"{step_rows}, {plan.tokens / in_matmuls:.3g} per matmul weight"),
        (
            "FLOPs",
            f"{plan.flops:.3g}",
            f"{format_count(plan.flops_per_token)} per token: matmuls and attention, forward and backward",
        ),
        (
            "time",
            format_duration(plan.seconds),
            f"{format_count(plan.tokens_per_second)} tokens/s at an MFU of {plan.mfu:.0%} (peak: {peak})",
        ),
    ]
    if plan.communication_bytes_per_step:
        transfer_time = f"{plan.communication_seconds_per_step * 1e3:,.1f} ms"
        transfer_size = f"{format_bytes(plan.communication_bytes_per_step)} sent by each device"
        explanation = f"{transfer_time} of it transfer gradients and weights, {transfer_size}"
        rows.append(("step", f"{plan.step_seconds * 1e3:,.0f} ms", explanation))
    notes = {
        "activations": f"{plan.micro_batch:,} rows at once (--micro-batch)",
        "optimizer step": "after the activations are freed",
    }
    for part, size in plan.memory_bytes_per_device.items():
        rows.append((part, format_bytes(size), notes.get(part, "")))
    warning = "" if plan.fits else ": DOES NOT FIT, not even with one row at a time"
    rows.append(("memory", format_bytes(plan.memory_bytes), f"of {plan.device_memory_gb:g} GB on each device{warning}"))
    if plan.dollars is not None:
        rows.append(("cost", f"${plan.dollars:,.2f}", "at hourly rates (--dollars for your price)"))
    return rows


def format_count(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def format_bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 172800:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:.1f} days"
