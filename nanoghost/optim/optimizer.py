"""Muon for matrices, AdamW for the rest, and the gradient synchronisation between processes, all in one step().

There is no DistributedDataParallel wrapper. Parameters of one kind and shape form a bucket: one flat tensor that the
parameters are views of. A step of a bucket is: reduce-scatter the gradients (SUM, then divide: gloo's AVG has summed
silently), update the own shard from its fp32 master weights, all-gather the new working weights. All buckets' gradients are
under way at once, and a bucket's weights travel while the next one is updated (ranks.py). With one process the same lines
run without the two communications. Optimizer state exists only for the own shard (ZeRO stage 1).

Muon (Jordan et al. 2024) with the Polar Express iteration (Amsel et al. 2025) and NorMuon's row scaling (Li et al.
2025); AdamW (Loshchilov and Hutter 2019); decay only where it agrees with the update ("cautious", Chen et al. 2025).
"""

import math
from dataclasses import dataclass

import torch

# Coefficients of the odd polynomials x -> ax + bx^3 + cx^5, one a step; from Polar Express, Algorithm 1
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


@dataclass(frozen=True)
class Group:
    """How one kind of parameters is updated."""

    kind: str
    """muon or adamw."""
    learning_rate: float
    """At the top of the schedule."""
    beta1: float = 0.8
    """First moment; of Muon, the momentum."""
    beta2: float = 0.95
    """Second moment."""
    weight_decay: float = 0.0
    """Per step, times the learning rate."""


def orthogonalize(g_NRC, iterations: int = len(POLAR_EXPRESS)):
    """Each (R, C) matrix U S V^T becomes nearly U V^T: its singular values go to about 1. Works in the given dtype."""
    x = g_NRC.mT if g_NRC.size(-2) > g_NRC.size(-1) else g_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if g_NRC.size(-2) > g_NRC.size(-1) else x


class Bucket:
    """Parameters of one kind and row shape as one flat tensor, updated together, sharded over the ranks."""

    iterations = len(POLAR_EXPRESS)

    def __init__(self, parameters, group: Group, rank: int, world: int, compute_dtype):
        self.parameters, self.group, self.rank, self.world = parameters, group, rank, world
        self.compute_dtype = compute_dtype
        # Muon needs whole matrices, so it deals those out; AdamW is elementwise and can be cut anywhere
        self.row_shape = parameters[0].shape[1:] if group.kind == "muon" else ()
        self.rows = sum(p.numel() for p in parameters) // math.prod(self.row_shape)
        self.rows_per_rank = -(-self.rows // world)
        self.first_row = rank * self.rows_per_rank
        first = parameters[0]
        self.work = first.new_zeros(self.rows_per_rank * world, *self.row_shape, requires_grad=False)
        self.load_parameters()
        self.master = self._own(self.work).float().clone()
        self.moment1 = torch.zeros_like(self.master)
        per_row = (*self.master.shape[:-1], 1) if group.kind == "muon" else self.master.shape
        self.moment2 = self.master.new_zeros(per_row)

    def load_parameters(self):
        """Copy the parameters into the flat tensor and make them views of it."""
        flat, start = self.work.view(-1), 0
        for p in self.parameters:
            end = start + p.numel()
            flat[start:end] = p.data.flatten()
            p.data = flat[start:end].view(p.shape)
            start = end

    def _own(self, stacked):
        return stacked[self.first_row : self.first_row + self.rows_per_rank]

    def send(self):
        """Let the gradients travel to the ranks that own them; with one process they are fetched when they are needed."""
        if self.world > 1:
            from nanoghost.optim.collectives import reduce_scatter

            self.arriving = reduce_scatter(self.gradient(), self.work.numel(), self.world)

    def gradient(self):
        """The gradients of this process, flat; its parameters have none any more."""
        # a rank that drew no informative attempts (rl.py) has no gradient of its own
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return flat

    def step(self, scale: float, time: int):
        """Update the own shard, and let the new weights travel."""
        g = self.gradient().float() if self.world == 1 else self.arriving.wait()
        g = g.view(self.master.shape)
        rate = self.group.learning_rate * scale
        update = self._muon(g, time) if self.group.kind == "muon" else self._adamw(g, time)
        if self.group.kind == "muon":
            rate *= max(1, self.row_shape[0] / self.row_shape[1]) ** 0.5
        if self.group.weight_decay:
            agrees = (update * self.master) > 0
            self.master.addcmul_(self.master, agrees, value=-rate * self.group.weight_decay)
        self.master.sub_(update, alpha=rate)
        self.publish()

    def publish(self):
        """The working weights become the masters, rounded; those of others are under way."""
        if self.world == 1:
            self.work.copy_(self.master)
        else:
            from nanoghost.optim.collectives import all_gather

            self.arriving = all_gather(self.work, self.master.to(self.work.dtype), self.rank, self.world)

    def _muon(self, g, time):
        self.moment1.lerp_(g, 1 - self.group.beta1)
        u = orthogonalize(
            g.lerp_(self.moment1, self.group.beta1).to(self.compute_dtype), self.iterations
        ).float()  # Nesterov
        size = u.norm(dim=(-2, -1), keepdim=True)
        self.moment2.lerp_(u.square().mean(-1, keepdim=True), 1 - self.group.beta2)
        u = u * torch.rsqrt(self.moment2 / (1 - self.group.beta2**time) + 1e-10)
        return u * (size / (u.norm(dim=(-2, -1), keepdim=True) + 1e-10))

    def _adamw(self, g, time):
        self.moment1.lerp_(g, 1 - self.group.beta1)
        self.moment2.lerp_(g.square_(), 1 - self.group.beta2)
        # rsqrt is many times faster than sqrt and a division here; 1e-20 under the root is the usual eps of 1e-10
        update = torch.rsqrt(self.moment2 + 1e-20).mul_(self.moment1)
        return update.mul_((1 - self.group.beta2**time) ** 0.5 / (1 - self.group.beta1**time))

    def state(self):
        return {"master": self.master, "moment1": self.moment1, "moment2": self.moment2}


class Optimizer:
    """All buckets of a model. `groups` maps the names of `model.parameter_groups()` to their Group."""

    bucket = Bucket  # how the parameters of a bucket are updated

    def __init__(self, model, groups: dict[str, Group], compute_dtype, rank: int = 0, world: int = 1):
        self.buckets: dict[str, Bucket] = {}
        self.time = 0
        for name, parameters in model.parameter_groups().items():
            kinds: dict[str, list] = {}
            for p in parameters:
                shape = "x".join(map(str, p.shape[1:])) if groups[name].kind == "muon" else str(p.dtype)
                kinds.setdefault(f"{name}.{shape}", []).append(p)
            for key, same in kinds.items():
                self.buckets[key] = self.bucket(same, groups[name], rank, world, compute_dtype)

    def step(self, scale: float = 1.0):
        """Update every parameter from its .grad and clear it. `scale` multiplies all learning rates (the schedule)."""
        self.time += 1
        with torch.no_grad():
            for bucket in self.buckets.values():
                bucket.send()
            for bucket in self.buckets.values():
                bucket.step(scale, self.time)
            self.wait()

    def wait(self) -> None:
        """Until the weights of all ranks are here."""
        for bucket in self.buckets.values():
            if bucket.world > 1:
                bucket.arriving = bucket.arriving.wait()

    def state(self) -> dict[str, torch.Tensor]:
        """Own shard of the state as flat named tensors, for safetensors."""
        tensors = {f"{key}/{part}": t for key, b in self.buckets.items() for part, t in b.state().items()}
        return tensors | {"time": torch.tensor(self.time)}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore masters and moments, and the model's working weights from the masters."""
        self.time = int(state["time"])
        for key, bucket in self.buckets.items():
            for part, tensor in bucket.state().items():
                tensor.copy_(state[f"{key}/{part}"])
            bucket.publish()
        self.wait()
