"""Memory of a training step, counted on the real classes.

Weights, gradients and optimizer states come from an optimizer on PyTorch's meta device, whose tensors have shapes and
no memory. What autograd saves for the backward pass is measured on toy models and extrapolated to the planned size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanoghost.commands.plan_hardware import USABLE_MEMORY, Cluster
from nanoghost.model.interface import ModelConfig
from nanoghost.model.registry import config_for_depth, new_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.train.hyperparameters import pretrain_groups

TOY_SIZES = (  # depth, context, vocabulary size
    (2, 64, 512),
    (4, 64, 512),
    (6, 96, 768),
    (2, 128, 512),
    (2, 64, 1024),
    (4, 128, 1024),
)


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of each device."""

    parts: dict[str, int]
    """Bytes by what occupies them: weights, gradients, optimizer, activations, optimizer step."""
    peak: int
    """Largest number of bytes at one time."""
    micro_batch: int
    """Rows that go through the model at once."""
    fits: bool


def plan_memory(model, optimizer: Optimizer, cluster: Cluster, row_bytes: float, rows: int) -> MemoryPlan:
    """Memory of a step of `rows` rows on each device, with the largest micro-batch that fits.

    `model` and `optimizer` are on the meta device; `row_bytes` are the activations of a row.
    """
    buckets = optimizer.buckets.values()
    gradients = tensor_bytes(bucket.params for bucket in buckets)
    weights = gradients + tensor_bytes(model.buffers())
    optimizer_states = sum(tensor_bytes(bucket.state().values()) for bucket in buckets)
    step = optimizer_step_bytes(optimizer, cluster.count)
    permanent = weights + gradients + optimizer_states
    usable = USABLE_MEMORY * cluster.device.memory_gb * 1e9
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    micro_batch = max((n for n in divisors if permanent + n * row_bytes <= usable), default=1)
    activations = micro_batch * row_bytes
    peak = permanent + max(activations, step)  # activations are freed before the optimizer step
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer_states,
        "activations": round(activations),
        "optimizer step": step,
    }
    return MemoryPlan(parts, round(peak), micro_batch, peak <= usable)


def meta_optimizer(model, dtype: torch.dtype, num_devices: int) -> Optimizer:
    """The optimizer on one of the devices; `model` is on the meta device, in the compute dtype."""
    return Optimizer(model, pretrain_groups(model.config.width), dtype, rank=0, world_size=num_devices)


def optimizer_step_bytes(optimizer: Optimizer, num_devices: int) -> int:
    """Temporary tensors of an optimizer step, all in fp32.

    Muon works on four copies of a bucket's shard, AdamW on two. With several devices, all gradients are in flight.
    """
    buckets = optimizer.buckets.values()
    copies = max(bucket.master.numel() * (4 if bucket.is_muon else 2) for bucket in buckets)
    in_flight = sum(bucket.params.numel() for bucket in buckets) if num_devices > 1 else 0
    return 4 * (copies + in_flight)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def activation_bytes(arch: str, config: ModelConfig, dtype: torch.dtype) -> float:
    """Bytes that autograd saves for one row of `config.context` tokens.

    Per token they are linear in depth * width, width, context and vocabulary, plus a constant. The five coefficients
    are fitted to toy models.
    """
    toys = [config_for_depth(arch, depth, vocab_size, context) for depth, context, vocab_size in TOY_SIZES]
    measured = torch.tensor([[saved_bytes(toy, dtype) / toy.context] for toy in toys], dtype=torch.float64)
    toy_features = torch.tensor([features(toy) for toy in toys], dtype=torch.float64)
    coefficients = torch.linalg.lstsq(toy_features, measured).solution[:, 0]
    return (torch.tensor(features(config), dtype=torch.float64) @ coefficients).item() * config.context


def features(config: ModelConfig) -> list[float]:
    """The quantities in which the activation memory of a token is linear."""
    return [config.depth * config.width, config.width, config.context, config.vocab_size, 1.0]


def saved_bytes(config: ModelConfig, dtype: torch.dtype, rows: int = 2) -> float:
    """Bytes that autograd saves for a row in a real forward pass, without the parameters; each storage counts once."""
    torch.manual_seed(0)
    model = new_model(config).cast(dtype)
    parameter_storages = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(config.vocab_size, (rows, config.context + 1))
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model.logprobs(tokens[:, :-1], tokens[:, 1:]).sum()
    del loss  # until here it holds the saved tensors, so that no address is used twice
    return sum(sizes.values()) / rows
