"""`--shard model`: for models too large for one device, each of which then holds only its share of the weights and gradients too.

FSDP2 (`fully_shard`) wraps the model from outside: it gathers a layer's weights before the layer is needed and gives them away
after it, and leaves each rank the mean gradient of its share. Weights are kept in fp32 and gathered in the compute dtype. The
optimizer is the same; only where its rows come from differs. Muon needs whole matrices, of which FSDP has cut the rows into
slices: an all-to-all deals out the matrices, and another one brings the new slices back. SUM and a division, since gloo's AVG sums.
"""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from nanoghost import distributed, hardware
from nanoghost.errors import UserError
from nanoghost.model.registry import architecture
from nanoghost.optim.collectives import Arriving
from nanoghost.optim.optimizer import Bucket, Group, Optimizer


def shard(model, groups: dict[str, Group]):
    """(the model, an optimizer for it). Each rank needs room for all of it once."""
    rank, world = distributed.rank_and_world_size()
    if world == 1:
        raise UserError("--shard model needs several processes: start it with torchrun")
    if model.adapters:
        raise UserError("--shard model trains all weights: leave out --lora")
    model = model.cast(torch.float32)
    matrices = {p for name, ps in model.parameter_groups().items() for p in ps if groups[name].kind == "muon"}
    for p in matrices:
        if p.size(1) % world:
            raise UserError(
                f"--shard model cuts matrices of {p.size(1)} rows into slices, and {world} processes do not divide them"
            )
    policy = MixedPrecisionPolicy(hardware.compute_dtype(), torch.float32, cast_forward_inputs=False)

    def place(p):
        return Shard(1) if p in matrices else Shard(0)

    for module in [*model.blocks, model]:
        fully_shard(module, mp_policy=policy, shard_placement_fn=place)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # it returns a view, which nobody changes in place
    model.whole = partial(whole, model)
    return model, ShardedOptimizer(model, groups, hardware.compute_dtype(), rank, world)


def whole(model):
    """The same model in one piece, to be saved; on all ranks, which together give what it needs."""
    plain = architecture(model.config.model_type)[1](model.config)
    own = plain.state_dict()
    for name, t in model.state_dict().items():
        own[name].copy_(t.full_tensor() if hasattr(t, "full_tensor") else t)
    return plain.cast(hardware.compute_dtype())


class ShardedBucket(Bucket):
    """Matrices of one shape, or a single other parameter; `parameters` are FSDP's."""

    def __init__(self, parameters, group: Group, rank: int, world: int, compute_dtype):
        self.parameters, self.group, self.rank, self.world, self.compute_dtype = (
            parameters,
            group,
            rank,
            world,
            compute_dtype,
        )
        self.own = [p.to_local().detach() for p in parameters]
        if group.kind == "muon":
            self.row_shape = parameters[0].shape[1:]
            self.rows = sum(len(p) for p in parameters)
            self.rows_per_rank = -(-self.rows // world)
            self.first_row = rank * self.rows_per_rank
            self.master = self.deal(self.own).wait().clone()
        else:
            (p,) = parameters
            self.row_shape = ()
            self.first_row = min(rank * -(-len(p) // world), len(p)) * p[:1].numel()
            self.master = self.own[0].flatten().clone()
        self.moment1 = torch.zeros_like(self.master)
        per_row = (*self.master.shape[:-1], 1) if group.kind == "muon" else self.master.shape
        self.moment2 = self.master.new_zeros(per_row)

    def deal(self, slices) -> Arriving:
        """Slices of all matrices become whole matrices, of which this rank gets its own, (rows_per_rank, R, C)."""
        flat = torch.cat(slices)
        padded = flat.new_zeros(self.rows_per_rank * self.world, *flat.shape[1:])
        padded[: self.rows] = flat
        got = torch.empty_like(padded)
        handle = dist.all_to_all_single(got, padded, async_op=True)
        parts = got.view(self.world, self.rows_per_rank, *flat.shape[1:])  # from each rank its slice
        return Arriving([handle], lambda: parts.transpose(0, 1).reshape(self.rows_per_rank, *self.row_shape))

    def send(self):
        gradients = [p.grad.to_local() for p in self.parameters]  # the mean over the ranks: FSDP has seen to it
        for p in self.parameters:
            p.grad = None
        if self.group.kind == "muon":
            self.arriving = self.deal(gradients)
        else:
            self.arriving = Arriving([], lambda: gradients[0].flatten())

    def gradient(self):
        for p in self.parameters:
            p.grad = None

    def publish(self):
        """The new weights go where FSDP looks for them."""
        if self.group.kind == "muon":
            slices = (
                self.master.view(self.rows_per_rank, self.world, -1, self.row_shape[1]).transpose(0, 1).contiguous()
            )
            got = torch.empty_like(slices)
            handle = dist.all_to_all_single(got, slices, async_op=True)
            self.arriving = Arriving(
                [handle], lambda: self.take(got.flatten(0, 1)[: self.rows].split([len(p) for p in self.own]))
            )
        else:
            self.arriving = Arriving([], lambda: self.take([self.master.view_as(self.own[0])]))

    def take(self, slices):
        for own, new in zip(self.own, slices):
            own.copy_(new)


class ShardedOptimizer(Optimizer):
    def __init__(self, model, groups: dict[str, Group], compute_dtype, rank: int, world: int):
        self.buckets, self.time = {}, 0
        for name, parameters in model.parameter_groups().items():
            kinds: dict[str, list] = {}
            for number, p in enumerate(parameters):
                kind = "x".join(map(str, p.shape[1:])) if groups[name].kind == "muon" else str(number)
                kinds.setdefault(f"{name}.{kind}", []).append(p)
            with torch.no_grad():
                for key, same in kinds.items():
                    self.buckets[key] = ShardedBucket(same, groups[name], rank, world, compute_dtype)
