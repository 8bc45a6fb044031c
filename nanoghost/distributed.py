"""The processes that torchrun starts: who this one is, and the few collective operations that stages need."""

import atexit
import os

import torch
import torch.distributed as dist

from nanoghost.errors import UserError
from nanoghost.hardware import device


def ranks() -> tuple[int, int]:
    """(rank, world size) as torchrun announces them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed() -> None:
    """Connect the processes that torchrun started (gloo on the CPU, nccl on CUDA); alone, do nothing."""
    _, world_size = ranks()
    if world_size == 1:
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"WORLD_SIZE={world_size} is set, but MASTER_ADDR is not: start with torchrun, or unset it")
    if device().type == "cuda":
        torch.cuda.set_device(device())
    if not dist.is_initialized():  # by an earlier stage of the same command
        # torchrun keeps its store over restarts: without a prefix a rank may find the address of one that has died
        store, rank, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            "nccl" if device().type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size
        )
        # gloo's threads hold tensors: freed when Python is half gone, they abort the process (pytorch/pytorch#179291)
        atexit.register(dist.destroy_process_group)


def all_reduce_mean(*values: float):
    """The mean of a number over all processes; of several numbers, a list."""
    means = list(values)
    if ranks()[1] > 1:
        totals = torch.tensor(values, dtype=torch.float64, device=device())
        dist.all_reduce(totals)
        means = (totals / ranks()[1]).tolist()
    return means if len(means) > 1 else means[0]


def barrier() -> None:
    """Until every process has come here."""
    if ranks()[1] > 1:
        dist.barrier()


def all_gather_object(value) -> list:
    """The values of all processes, in the order of their ranks."""
    everyone = [value] * ranks()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, value)
    return everyone
