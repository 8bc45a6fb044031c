"""Processes started by torchrun: the rank of this one, and the few collective operations that the stages need."""

import atexit
import os

import torch
import torch.distributed as dist

from nanoghost.errors import UserError
from nanoghost.hardware import device


def rank_and_world_size() -> tuple[int, int]:
    """From the environment that torchrun sets; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and prints for all processes."""
    return rank_and_world_size()[0] == 0


def init_distributed() -> None:
    """Connect the processes that torchrun started (gloo on the CPU, nccl on CUDA). Does nothing in a single process."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"WORLD_SIZE={world_size} is set, but MASTER_ADDR is not: start with torchrun, or unset WORLD_SIZE"
        )
    on_cuda = device().type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device())
    if dist.is_initialized():  # by an earlier stage of the same command
        return
    # torchrun keeps its store over restarts: without a prefix a rank might read the address of a process that has died
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=world_size)
    # gloo's threads hold tensors: if they are freed while Python shuts down, the process aborts
    # (pytorch/pytorch#179291)
    atexit.register(dist.destroy_process_group)


def all_reduce_mean(*values: float):
    """The mean of a number over all processes; of several numbers, a list of their means."""
    means = list(values)
    _, world_size = rank_and_world_size()
    if world_size > 1:
        totals = torch.tensor(values, dtype=torch.float64, device=device())
        dist.all_reduce(totals)
        means = (totals / world_size).tolist()
    return means if len(means) > 1 else means[0]


def barrier() -> None:
    """Wait until every process has called this."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def all_gather_object(value) -> list:
    """The values of all processes, in the order of their ranks."""
    _, world_size = rank_and_world_size()
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values
