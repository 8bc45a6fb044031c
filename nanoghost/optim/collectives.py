"""How the optimizer's step talks to other processes: sums and copies that run in the background, SUM and never AVG.

nccl has both operations. gloo's own reduce-scatter is an all-reduce for each rank, and its all-gather copies everything
twice; made of its simplest parts they are several times faster: all-to-all and a sum of our own (in fp32, in the order of the
ranks, whatever format was sent), and a broadcast from each rank into the place where its shard belongs.
"""

import torch
import torch.distributed as dist


class Arriving:
    """A tensor under way: `wait()` gives it."""

    def __init__(self, handles, finish):
        self.handles, self.finish = handles, finish

    def wait(self) -> torch.Tensor:
        for handle in self.handles:
            handle.wait()
        return self.finish()


def reduce_scatter(flat: torch.Tensor, size: int, world: int) -> Arriving:
    """This rank's part of the mean of `flat` over the ranks, in fp32; zeros fill it up to `size`, which they can share evenly."""
    if len(flat) < size:
        flat = torch.cat([flat, flat.new_zeros(size - len(flat))])
    if dist.get_backend() == "nccl":
        shard = flat.new_empty(len(flat) // world, dtype=torch.float32)
        handle = dist.reduce_scatter_single(shard, flat.float(), op=dist.ReduceOp.SUM, async_op=True)
        return Arriving([handle], lambda: shard.div_(world))
    parts = torch.empty_like(flat)
    handle = dist.all_to_all_single(parts, flat, async_op=True)

    def mean() -> torch.Tensor:
        first, *others = parts.view(world, -1)
        shard = first.float() if first.dtype != torch.float32 else first
        for part in others:
            shard.add_(part)
        return shard.div_(world)

    return Arriving([handle], mean)


def all_gather(whole: torch.Tensor, own: torch.Tensor, rank: int, world: int) -> Arriving:
    """Fill `whole`, the same on all ranks, with what each has of it."""
    if dist.get_backend() == "nccl":
        return Arriving([dist.all_gather_single(whole, own, async_op=True)], lambda: whole)
    places = whole.view(world, -1)
    places[rank] = own.flatten()
    return Arriving([dist.broadcast(places[r], r, async_op=True) for r in range(world)], lambda: whole)


def volume(buckets, world: int) -> dict[str, int]:
    """Bytes that one rank sends in a step (and gets): of each bucket all but its own shard, once as gradients and once as weights.

    Gradients travel in their own format on gloo, where they are summed in fp32 after the journey, and in fp32 on nccl.
    """
    others = [(b, b.work.numel() * (world - 1) // world) for b in buckets]
    weights = sum(n * b.work.element_size() for b, n in others)
    return {"gradients (gloo)": weights, "gradients (nccl)": sum(4 * n for _, n in others), "weights": weights}
