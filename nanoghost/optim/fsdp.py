"""`--shard model`: models too large for one device. Each device holds a shard of the weights and gradients.

FSDP2 (`fully_shard`) wraps the model from outside: it all-gathers the weights of a layer before they are used, frees
them afterwards, and leaves each rank the mean gradient of its shard. Weights are kept in fp32 and gathered in the
compute dtype. The optimizer is the same, only its shards come from FSDP. Muon needs whole matrices, of which each rank
has a slice of the columns: an all-to-all exchanges slices of all matrices for some whole matrices, and a second one
returns the updated slices. Means are a SUM and a division, as in collectives.py.

W ranks, N matrices of all ranks, n = N / W of one rank (both padded), R rows and C columns of a matrix,
c = C / W columns of a slice.
"""

import math
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from nanoghost import distributed, hardware
from nanoghost.errors import UserError
from nanoghost.model.registry import new_model
from nanoghost.optim.collectives import PendingTensor
from nanoghost.optim.optimizer import Bucket, Optimizer, UpdateRule, bucket_contents

ROWS, COLUMNS = 0, 1


def shard_model(model, rules: dict[str, UpdateRule]):
    """(the sharded model, an optimizer for it). Each rank needs memory for the whole model once."""
    rank, world_size = distributed.rank_and_world_size()
    if world_size == 1:
        raise UserError("--shard model needs several processes: start it with torchrun")
    if model.adapters:
        raise UserError("--shard model trains all weights: leave out --lora")
    model = model.cast(torch.float32)
    matrices = {p for name, ps in model.parameter_groups().items() for p in ps if rules[name].algorithm == "muon"}
    for p in matrices:
        if p.size(COLUMNS) % world_size:
            raise UserError(
                f"--shard model cannot divide matrices of {p.size(COLUMNS)} columns evenly over {world_size} processes:"
                " choose another --depth or number of processes"
            )
    policy = MixedPrecisionPolicy(hardware.compute_dtype(), torch.float32, cast_forward_inputs=False)

    def placement(p) -> Shard:
        return Shard(COLUMNS if p in matrices else ROWS)

    for module in [*model.blocks, model]:
        fully_shard(module, mp_policy=policy, shard_placement_fn=placement)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it returns a view, which nothing here modifies in place
    return model, ShardedOptimizer(model, rules, hardware.compute_dtype(), rank, world_size)


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def full_model(model):
    """A sharded model in one piece, on every rank; other models as they are. All ranks must call it together."""
    if not is_sharded(model):
        return model
    full = new_model(model.config)
    tensors = full.state_dict()
    for name, t in model.state_dict().items():
        tensors[name].copy_(t.full_tensor() if isinstance(t, DTensor) else t)
    return full.cast(hardware.compute_dtype())


class ShardedBucket(Bucket):
    """Matrices of one shape, or one other parameter; `parameters` are FSDP's."""

    def __init__(self, parameters, matrix_shape, rule: UpdateRule, rank: int, world_size: int, compute_dtype):
        self.parameters, self.rule, self.compute_dtype = parameters, rule, compute_dtype
        self.rank, self.world_size = rank, world_size
        self.row_shape = matrix_shape
        self.local_shards = [p.to_local().detach() for p in parameters]
        if self.is_muon:
            self.num_matrices = sum(p.numel() for p in parameters) // math.prod(matrix_shape)
            self.rows_per_rank = math.ceil(self.num_matrices / world_size)
            self.first_row = rank * self.rows_per_rank
            self.master = self.start_exchange_to_matrices(self.local_shards).wait().clone()
        else:
            (p,) = parameters
            elements_per_row = p[:1].numel()
            self.first_row = min(rank * math.ceil(len(p) / world_size), len(p)) * elements_per_row
            self.master = self.local_shards[0].flatten().clone()
        self.init_moments()

    def start_exchange_to_matrices(self, slices) -> PendingTensor:
        """Start exchanging column slices of all matrices for whole matrices of this rank, (n, R, C)."""
        R, C = self.row_shape
        W, n, c = self.world_size, self.rows_per_rank, C // self.world_size
        slices_NRc = slices[0].new_zeros(n * W, R, c)
        slices_NRc[: self.num_matrices] = torch.cat([s.reshape(-1, R, c) for s in slices])
        received_WnRc = slices_NRc.new_empty(W, n, R, c)
        handle = dist.all_to_all_single(received_WnRc.view(n * W, R, c), slices_NRc, async_op=True)
        return PendingTensor(lambda: received_WnRc.permute(1, 2, 0, 3).reshape(n, R, C), [handle])

    def start_reduce_scatter(self) -> None:
        gradients = [p.grad.to_local() for p in self.parameters]  # FSDP has averaged them over the ranks
        self.zero_grad()
        if self.is_muon:
            self.pending_gradient = self.start_exchange_to_matrices(gradients)
        else:
            self.pending_gradient = PendingTensor(gradients[0].flatten)

    def start_all_gather(self) -> None:
        """Start bringing the new weights back into FSDP's shards."""
        if not self.is_muon:
            self.local_shards[0].copy_(self.master.view_as(self.local_shards[0]))
            return
        R, C = self.row_shape
        W, n, c = self.world_size, self.rows_per_rank, C // self.world_size
        slices_WnRc = self.master.view(n, R, W, c).permute(2, 0, 1, 3).contiguous()
        received_NRc = slices_WnRc.new_empty(W * n, R, c)
        handle = dist.all_to_all_single(received_NRc, slices_WnRc.view(W * n, R, c), async_op=True)

        def copy_to_shards() -> torch.Tensor:
            counts = [shard.numel() // (R * c) for shard in self.local_shards]
            for shard, slices in zip(self.local_shards, received_NRc[: self.num_matrices].split(counts)):
                shard.copy_(slices.reshape(shard.shape))
            return received_NRc

        self.pending_params = PendingTensor(copy_to_shards, [handle])

    def wait_for_params(self) -> None:
        if self.is_muon:
            self.pending_params.wait()


class ShardedOptimizer(Optimizer):
    def __init__(self, model, rules: dict[str, UpdateRule], compute_dtype, rank: int, world_size: int):
        self.buckets, self.steps = {}, 0
        with torch.no_grad():
            for key, rule, shape, parameters in bucket_contents(model, rules):
                if rule.algorithm == "muon":
                    buckets = {key: parameters}
                else:  # FSDP shards each parameter on its own, so they cannot share a flat tensor
                    buckets = {f"{key}.{i}": [p] for i, p in enumerate(parameters)}
                for bucket_key, contents in buckets.items():
                    self.buckets[bucket_key] = ShardedBucket(contents, shape, rule, rank, world_size, compute_dtype)
