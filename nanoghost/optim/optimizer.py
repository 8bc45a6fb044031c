"""Muon for matrices, AdamW for all other parameters, and the gradient synchronization between processes, in one step().

There is no DistributedDataParallel wrapper. Parameters of one group and shape form a bucket: one flat tensor that the
parameters are views of. A step of a bucket reduce-scatters the gradients, updates this rank's shard of the fp32 master
weights, and all-gathers the new weights in the compute dtype. The gradients of all buckets are under way at the same
time, and the weights of a bucket while the next one is updated (collectives.py). A single process runs the same code
without the communication. Each rank keeps optimizer state for its shard only (ZeRO stage 1, Rajbhandari et al. 2020).

Muon (Jordan et al. 2024) with the Polar Express iteration (Amsel et al. 2025) and NorMuon's row scaling (Li et al.
2025); AdamW (Loshchilov and Hutter 2019). Weight decay acts only where its sign agrees with the update ("cautious",
Chen et al. 2025).

N matrices or, for AdamW, elements; R rows and C columns of a matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nanoghost.optim.collectives import PendingTensor, start_all_gather, start_reduce_scatter

# Coefficients of the odd polynomials x -> ax + bx^3 + cx^5, one for each iteration; from Polar Express, Algorithm 1
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class UpdateRule:
    """How the parameters of one group are updated."""

    algorithm: str
    """muon or adamw."""
    learning_rate: float
    """Peak learning rate."""
    beta1: float = 0.8
    """Decay of the first moment; Muon's momentum."""
    beta2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Fraction of a weight that decays in a step, as a multiple of the learning rate."""


def orthogonalize(g_NRC, iterations: int = len(POLAR_EXPRESS)):
    """Bring each matrix U S V^T close to U V^T, with singular values of about 1. Computes in the dtype of the input."""
    is_tall = g_NRC.size(-2) > g_NRC.size(-1)
    x = g_NRC.mT if is_tall else g_NRC
    # 1.02 is a margin for rounding errors: the iteration expects singular values of at most 1
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Bucket:
    """Parameters of one group and shape as one flat tensor, updated together and sharded over the ranks.

    Muon needs whole matrices, so a row of the flat tensor is a matrix (R, C). AdamW is elementwise, so a row is an
    element.
    """

    iterations = len(POLAR_EXPRESS)

    pending_gradient: PendingTensor
    """This rank's shard of the mean gradient, between start_reduce_scatter and step."""
    pending_params: PendingTensor
    """The new parameters of all ranks, between start_all_gather and wait_for_params."""

    def __init__(
        self, parameters: list[nn.Parameter], matrix_shape, rule: UpdateRule, rank: int, world_size: int, compute_dtype
    ):
        self.parameters, self.rule, self.compute_dtype = parameters, rule, compute_dtype
        self.rank, self.world_size = rank, world_size
        self.row_shape = matrix_shape
        rows = sum(p.numel() for p in parameters) // math.prod(self.row_shape)
        self.rows_per_rank = math.ceil(rows / world_size)
        self.params = parameters[0].new_zeros(self.rows_per_rank * world_size, *self.row_shape, requires_grad=False)
        self.load_parameters()
        self.first_row = rank * self.rows_per_rank
        self.master = self.params[self.first_row : self.first_row + self.rows_per_rank].float().clone()
        self.init_moments()

    def init_moments(self) -> None:
        self.exp_avg = torch.zeros_like(self.master)
        # Muon keeps one second moment for each row of a matrix (NorMuon)
        second_moment_shape = (*self.master.shape[:-1], 1) if self.is_muon else self.master.shape
        self.exp_avg_sq = self.master.new_zeros(second_moment_shape)

    @property
    def is_muon(self) -> bool:
        return self.rule.algorithm == "muon"

    def load_parameters(self) -> None:
        """Copy the parameters into the flat tensor and make them views of it."""
        flat, start = self.params.view(-1), 0
        for p in self.parameters:
            end = start + p.numel()
            flat[start:end] = p.data.flatten()
            p.data = flat[start:end].view(p.shape)
            start = end

    def start_reduce_scatter(self) -> None:
        """Start averaging the gradients over the ranks. A single process reads them in step instead."""
        if self.world_size > 1:
            self.pending_gradient = start_reduce_scatter(self.pop_flat_grad(), self.params.numel(), self.world_size)

    def pop_flat_grad(self) -> torch.Tensor:
        """The gradients of this process as one flat tensor; clears .grad of the parameters."""
        # A rank whose rollouts all have the same reward (rl.py) has no gradients
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        self.zero_grad()
        return flat

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self, lr_multiplier: float, step: int) -> None:
        """Update this rank's shard and start the all-gather of the new weights. `step` counts from 1."""
        g = self.pop_flat_grad().float() if self.world_size == 1 else self.pending_gradient.wait()
        g = g.view(self.master.shape)
        learning_rate = self.rule.learning_rate * lr_multiplier
        if self.is_muon:
            update = self._muon_update(g, step)
            rows, columns = self.row_shape
            learning_rate *= max(1, rows / columns) ** 0.5  # as in the implementation of Jordan et al.
        else:
            update = self._adamw_update(g, step)
        if self.rule.weight_decay:
            agrees = (update * self.master) > 0
            self.master.addcmul_(self.master, agrees, value=-learning_rate * self.rule.weight_decay)
        self.master.sub_(update, alpha=learning_rate)
        self.start_all_gather()

    def _muon_update(self, g, step: int):
        self.exp_avg.lerp_(g, 1 - self.rule.beta1)
        nesterov = g.lerp_(self.exp_avg, self.rule.beta1).to(self.compute_dtype)
        u = orthogonalize(nesterov, self.iterations).float()
        size = u.norm(dim=(-2, -1), keepdim=True)
        self.exp_avg_sq.lerp_(u.square().mean(-1, keepdim=True), 1 - self.rule.beta2)
        u = u * torch.rsqrt(self.exp_avg_sq / (1 - self.rule.beta2**step) + 1e-10)
        return u * (size / (u.norm(dim=(-2, -1), keepdim=True) + 1e-10))

    def _adamw_update(self, g, step: int):
        self.exp_avg.lerp_(g, 1 - self.rule.beta1)
        self.exp_avg_sq.lerp_(g.square_(), 1 - self.rule.beta2)
        # rsqrt is many times faster than sqrt and a division here; 1e-20 under the root is the usual eps of 1e-10
        update = torch.rsqrt(self.exp_avg_sq + 1e-20).mul_(self.exp_avg)
        return update.mul_((1 - self.rule.beta2**step) ** 0.5 / (1 - self.rule.beta1**step))

    def start_all_gather(self) -> None:
        """Round this rank's master weights to the dtype of the parameters, and start the all-gather."""
        if self.world_size == 1:
            self.params.copy_(self.master)
        else:
            shard = self.master.to(self.params.dtype)
            self.pending_params = start_all_gather(self.params, shard, self.rank, self.world_size)

    def wait_for_params(self) -> None:
        if self.world_size > 1:
            self.pending_params.wait()

    def state(self) -> dict[str, torch.Tensor]:
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class Optimizer:
    """The buckets of a model. `rules` has an UpdateRule for each name in `model.parameter_groups()`."""

    bucket_class = Bucket

    def __init__(self, model, rules: dict[str, UpdateRule], compute_dtype, rank: int = 0, world_size: int = 1):
        self.buckets: dict[str, Bucket] = {}
        self.steps = 0
        for key, rule, shape, parameters in bucket_contents(model, rules):
            self.buckets[key] = self.bucket_class(parameters, shape, rule, rank, world_size, compute_dtype)

    @torch.no_grad()
    def step(self, lr_multiplier: float = 1.0) -> None:
        """Update all parameters from their .grad and clear it. The schedule's `lr_multiplier` scales learning rates."""
        self.steps += 1
        for bucket in self.buckets.values():
            bucket.start_reduce_scatter()
        for bucket in self.buckets.values():
            bucket.step(lr_multiplier, self.steps)
        self.wait_for_params()

    def wait_for_params(self) -> None:
        for bucket in self.buckets.values():
            bucket.wait_for_params()

    def zero_grad(self) -> None:
        for bucket in self.buckets.values():
            bucket.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's shard of the state, as named tensors for safetensors."""
        tensors = {f"{key}/{part}": t for key, bucket in self.buckets.items() for part, t in bucket.state().items()}
        return tensors | {"steps": torch.tensor(self.steps)}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore masters and moments, and the model's parameters from the masters."""
        self.steps = int(state["steps"])
        for key, bucket in self.buckets.items():
            for part, tensor in bucket.state().items():
                tensor.copy_(state[f"{key}/{part}"])
            bucket.start_all_gather()
        self.wait_for_params()


def bucket_contents(model, rules: dict[str, UpdateRule]) -> Iterator[tuple[str, UpdateRule, tuple, list[nn.Parameter]]]:
    """(key, update rule, shape of a row, parameters) of each bucket.

    Parameters of a group share a bucket if they hold matrices of the same shape (Muon) or have the same dtype (AdamW).
    """
    num_stacked = model.stacked_matrices()
    for name, parameters in model.parameter_groups().items():
        buckets: dict[str, tuple[tuple, list[nn.Parameter]]] = {}
        for p in parameters:
            if rules[name].algorithm == "muon":
                shape = (p.size(0) // num_stacked.get(p, 1), p.size(1))
                key = f"{name}.{shape[0]}x{shape[1]}"
            else:
                shape = ()
                key = f"{name}.{p.dtype}"
            buckets.setdefault(key, (shape, []))[1].append(p)
        for key, (shape, bucket_parameters) in buckets.items():
            yield key, rules[name], shape, bucket_parameters
