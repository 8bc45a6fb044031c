"""Reduce-scatter and all-gather for the optimizer's step. They run in the background.

Means are a SUM and a division, because gloo sums when it is asked for AVG.

nccl has both operations. gloo implements its reduce-scatter as one all-reduce per rank, and its all-gather copies
everything twice. Built from simpler operations they are several times faster: an all-to-all followed by a local sum (in
fp32 and in the order of the ranks, whatever dtype was sent), and one broadcast per rank into the place of its shard.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class PendingTensor:
    """A tensor that a collective operation is still computing."""

    finish: Callable[[], torch.Tensor]
    """Called after the operation; returns the tensor."""
    handles: list = field(default_factory=list)

    def wait(self) -> torch.Tensor:
        for handle in self.handles:
            handle.wait()
        return self.finish()


def start_reduce_scatter(flat: torch.Tensor, padded_size: int, world_size: int) -> PendingTensor:
    """Start computing this rank's shard of the mean of `flat` over the ranks, in fp32.

    `padded_size` is divisible by the number of ranks; `flat` is padded to it with zeros.
    """
    if len(flat) < padded_size:
        flat = torch.cat([flat, flat.new_zeros(padded_size - len(flat))])
    if dist.get_backend() == "nccl":
        shard = flat.new_empty(len(flat) // world_size, dtype=torch.float32)
        handle = dist.reduce_scatter_single(shard, flat.float(), op=dist.ReduceOp.SUM, async_op=True)
        return PendingTensor(lambda: shard.div_(world_size), [handle])
    received = torch.empty_like(flat)
    handle = dist.all_to_all_single(received, flat, async_op=True)

    def mean() -> torch.Tensor:
        first, *others = received.view(world_size, -1)
        shard = first.float() if first.dtype != torch.float32 else first
        for part in others:
            shard.add_(part)
        return shard.div_(world_size)

    return PendingTensor(mean, [handle])


def start_all_gather(full: torch.Tensor, shard: torch.Tensor, rank: int, world_size: int) -> PendingTensor:
    """Start filling `full`, on all ranks, with the shards of all ranks."""
    if dist.get_backend() == "nccl":
        return PendingTensor(lambda: full, [dist.all_gather_single(full, shard, async_op=True)])
    shards = full.view(world_size, -1)
    shards[rank] = shard.flatten()
    handles = [dist.broadcast(shards[r], r, async_op=True) for r in range(world_size)]
    return PendingTensor(lambda: full, handles)


def communication_bytes(buckets: Iterable, world_size: int) -> dict[str, int]:
    """Bytes that one rank sends, and receives, in a step: all of each bucket but its own shard, twice.

    gloo sends gradients in the dtype of the weights, because they are summed in fp32 afterwards; nccl sends them in
    fp32.
    """
    weights = gradients_fp32 = 0
    for bucket in buckets:
        numel = bucket.params.numel() * (world_size - 1) // world_size
        weights += numel * bucket.params.element_size()
        gradients_fp32 += 4 * numel
    return {"gradients (gloo)": weights, "gradients (nccl)": gradients_fp32, "weights": weights}
