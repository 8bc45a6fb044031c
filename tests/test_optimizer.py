"""The optimizer against slow oracles: singular values by SVD, one matrix at a time, torch's AdamW; and several processes
against one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nanoghost import distributed, hardware
from nanoghost.data.batches import Batches
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.optim.collectives import communication_bytes
from nanoghost.optim.optimizer import POLAR_EXPRESS, Bucket, Optimizer, UpdateRule, orthogonalize
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.train.hyperparameters import pretrain_groups
from nanoghost.train.pretrain import accumulate_gradients
from tests.support.ranks import in_ranks


def toy_ghost(depth: int = 2) -> Ghost:
    """The same for every caller; matrices that start at zero are random, so that no gradient is only rounding noise."""
    torch.manual_seed(0)
    model = Ghost(GhostConfig(vocab_size=61, context=16, depth=depth, width=32, head_width=16, bigram_rows=64))
    model.character_table[:, :6] = torch.randint(1, 3, (61, 6), dtype=torch.int32)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.normal_(std=0.1)
            block.mlp.down.weight.normal_(std=0.1)
        model.head.weight.normal_(std=0.1)
    return model


STEPS = 50  # of a run


def toy_tokens() -> np.ndarray:
    return np.random.default_rng(0).zipf(1.3, 3000).astype("u2") % 61


# ── one matrix ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows, columns", [(48, 16), (16, 48), (32, 32)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_vectors(rows, columns):
    torch.manual_seed(0)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(3, rows, rank)).Q
    v = torch.linalg.qr(torch.randn(3, columns, rank)).Q
    s = torch.logspace(0, -2.5, rank)  # the largest 300 times the smallest
    result = u.mT @ orthogonalize(u * s @ v.mT) @ v
    near_one = result.diagonal(dim1=-2, dim2=-1)
    assert near_one.min() > 0.6 and near_one.max() < 1.25
    assert (result - torch.diag_embed(near_one)).abs().max() < 1e-3


def test_orthogonalize_does_not_see_scale_and_leaves_zero_at_zero():
    g = torch.randn(2, 8, 8)
    assert_close(orthogonalize(g * 1000), orthogonalize(g), rtol=1e-3, atol=1e-3)
    assert orthogonalize(torch.zeros(1, 8, 8)).count_nonzero() == 0


def slow_orthogonalize(g):
    """The polynomials of Polar Express on the singular values themselves, in fp64."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (s.norm() * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


# ── one bucket ──────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def follow(bucket: Bucket, gradients, scales):
    """The bucket's parameters after each step on given gradients."""
    for time, (gs, scale) in enumerate(zip(gradients, scales), 1):
        for p, g in zip(bucket.parameters, gs):
            p.grad = g.clone()
        bucket.step(scale, time)
        yield [p.detach().clone() for p in bucket.parameters]


def test_adamw_is_torchs_adamw():
    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(3), torch.randn(2, 2, 2)]
    sizes = torch.logspace(-6, 2, 7)  # columns whose gradients are tiny and huge
    gradients = [[torch.randn(5, 7) * sizes, torch.randn(3), torch.randn(2, 2, 2)] for _ in range(100)]
    for step in gradients:
        step[0][0] = 0  # a row that was never seen
    ours = Bucket(
        [p.clone().requires_grad_() for p in start], (), UpdateRule("adamw", 0.02, 0.8, 0.95), 0, 1, torch.float32
    )
    theirs = [p.clone().requires_grad_() for p in start]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    scales = torch.linspace(1, 0, 100).tolist()
    for step, after in enumerate(follow(ours, gradients, scales)):
        optimizer.param_groups[0]["lr"] = 0.02 * scales[step]
        for p, g in zip(theirs, gradients[step]):
            p.grad = g.clone()
        optimizer.step()
        assert_close(after, [p.detach() for p in theirs], rtol=1e-4, atol=1e-6)
    assert_close(after[0][0], start[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("rows, columns", [(12, 6), (6, 12), (8, 8)])
def test_muon_is_a_loop_over_matrices(rows, columns):
    torch.manual_seed(0)
    start = [torch.randn(3 * rows, columns), torch.randn(rows, columns)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(100)]
    scales = torch.linspace(1, 0.1, 100).tolist()
    group = UpdateRule("muon", 0.02, beta1=0.9, beta2=0.9, weight_decay=0.5)
    bucket = Bucket([p.clone().requires_grad_() for p in start], (rows, columns), group, 0, 1, torch.float32)

    weights = [m.double() for p in start for m in p.split(rows)]
    moments = [torch.zeros(rows, columns, dtype=torch.float64) for _ in weights]
    row_sizes = [torch.zeros(rows, 1, dtype=torch.float64) for _ in weights]
    for step, after in enumerate(follow(bucket, gradients, scales)):
        for i, g in enumerate(m.double() for p in gradients[step] for m in p.split(rows)):
            mu, rate = 0.9, 0.02 * scales[step] * max(1, rows / columns) ** 0.5
            moments[i] = mu * moments[i] + (1 - mu) * g
            update = slow_orthogonalize(mu * moments[i] + (1 - mu) * g)  # Nesterov
            row_sizes[i] = 0.9 * row_sizes[i] + 0.1 * update.square().mean(1, keepdim=True)
            scaled = update / (row_sizes[i] / (1 - 0.9 ** (step + 1))).sqrt()  # NorMuon
            update = scaled * update.norm() / scaled.norm()
            decay = 0.5 * torch.where(update * weights[i] > 0, weights[i], 0)  # only where it agrees
            weights[i] = weights[i] - rate * (update + decay)
        assert_close(torch.cat(after).double(), torch.cat(weights), rtol=1e-4, atol=1e-4)


# ── a model ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def train(model, optimizer, batches, steps) -> list[float]:
    losses = []
    for step in steps:
        loss = accumulate_gradients(model, *batches.at(step), micro_batch=4)
        losses.append(distributed.all_reduce_mean(loss))
        optimizer.step(lr_multiplier_at(step / STEPS))
    return losses


def recipe(model, dtype=torch.float32, rank=0, world=1) -> Optimizer:
    return Optimizer(model, pretrain_groups(model.config.width, 0.1), dtype, rank, world)


def everything(model) -> torch.Tensor:
    return torch.cat([p.detach().cpu().float().flatten() for p in model.parameters()])


def test_every_parameter_is_in_one_bucket_and_moves():
    model = toy_ghost()
    optimizer = recipe(model)
    owned = [id(p) for b in optimizer.buckets.values() for p in b.parameters]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model = model.to(hardware.device())
    train(model, optimizer, Batches(toy_tokens(), 16, 4, seed=0), range(2))
    assert all((p.cpu() != old).any() for p, old in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_bf16_weights_are_their_fp32_masters_rounded():
    model = toy_ghost().cast(torch.bfloat16)
    optimizer = recipe(model, torch.bfloat16)
    train(model, optimizer, Batches(toy_tokens(), 16, 4, seed=0), range(5))
    for bucket in optimizer.buckets.values():
        weights = torch.cat([p.detach().flatten() for p in bucket.parameters])
        assert bucket.master.dtype == torch.float32
        assert torch.equal(weights, bucket.master.flatten().to(weights.dtype))
    assert (
        model.dtype == torch.bfloat16
        and (optimizer.buckets["head.torch.bfloat16"].master != model.head.weight.flatten()).any()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_restores_exactly(dtype):
    batches = Batches(toy_tokens(), 16, 4, seed=0)
    model = toy_ghost().cast(dtype)
    optimizer = recipe(model, dtype)
    train(model, optimizer, batches, range(4))
    state = {k: t.clone() for k, t in optimizer.state().items()}

    restored = Ghost(model.config).cast(dtype)  # other random weights
    restored.character_table.copy_(model.character_table)
    again = recipe(restored, dtype)
    again.load_state(state)
    assert torch.equal(everything(restored), everything(model))
    for run in (model, optimizer), (restored, again):
        train(*run, batches, range(4, 8))
    assert torch.equal(everything(restored), everything(model))
    assert all(torch.equal(t, optimizer.state()[k]) for k, t in again.state().items())


# ── several processes ───────────────────────────────────────────────────────────────────────────────────────────────

WORLDS = (2, 3, 4)  # the toy's four square matrices, its two others and its scalars do not divide by all of them


class Sent(TorchDispatchMode):
    """Counts the bytes that leave this process in collectives between `world` ranks: all but its own part."""

    def __init__(self, world: int):
        super().__init__()
        self.world, self.bytes = world, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        if name == "alltoall_base_":
            self.count(name, args[1])
        elif name == "broadcast_" and args[2] == dist.get_rank():  # to each of the others
            self.count(name, args[0][0], self.world)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, tensor, times: int = 1) -> None:
        others = tensor.numel() * tensor.element_size() * times * (self.world - 1) // self.world
        self.bytes[name] = self.bytes.get(name, 0) + others


def one_of_several(folder: str) -> None:
    """Fifty steps in two micro-batches and more, with all state passed on to a new optimizer half way."""
    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world = distributed.rank_and_world_size()
    batches = Batches(toy_tokens(), 16, 12, 0, rank, world)
    model = toy_ghost(1)
    optimizer = recipe(model, rank=rank, world=world)
    losses = train(model, optimizer, batches, range(STEPS // 2))
    state, model = optimizer.state(), toy_ghost(1)
    optimizer = recipe(model, rank=rank, world=world)
    optimizer.load_state(state)
    losses += train(model, optimizer, batches, range(STEPS // 2, STEPS))
    result = {"losses": losses, "parameters": everything(model), "rows": batches.positions(7).tolist()}
    result["held"] = sum(t.numel() for t in optimizer.state().values())
    for dtype in (torch.float32, torch.bfloat16):
        model = toy_ghost(1).cast(dtype)
        optimizer = recipe(model, dtype, rank, world)
        accumulate_gradients(model, *batches.at(0), micro_batch=2)
        with Sent(world) as sent:
            optimizer.step()
        result[str(dtype)] = sent.bytes, communication_bytes(optimizer.buckets.values(), world)
    torch.save(result, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    in_ranks("tests.test_optimizer:one_of_several", WORLDS, folder)
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in WORLDS}


@pytest.fixture(scope="module")
def alone():
    model = toy_ghost(1)
    optimizer = recipe(model)
    batches = Batches(toy_tokens(), 16, 12, 0)
    losses = train(model, optimizer, batches, range(STEPS))
    held = sum(t.numel() for t in optimizer.state().values())
    return {"losses": losses, "parameters": everything(model), "rows": batches.positions(7).tolist(), "held": held}


@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_equal_one(several, alone, world):
    found = several[world]
    assert alone["losses"][-1] < alone["losses"][0] - 0.1
    assert all(
        r["losses"] == found[0]["losses"] and torch.equal(r["parameters"], found[0]["parameters"]) for r in found
    )
    assert_close(torch.tensor(found[0]["losses"]), torch.tensor(alone["losses"]), rtol=1e-5, atol=0)
    assert (found[0]["parameters"] - alone["parameters"]).norm() < 1e-5 * alone["parameters"].norm()
    assert all(r["held"] < (1.2 / world) * alone["held"] for r in found), (
        "each holds its share of the optimizer's state"
    )
    rows = [r["rows"] for r in found]
    assert [rows[i % world][i // world] for i in range(12)] == alone["rows"], "a step reads the same rows"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_as_much_is_sent_as_the_formula_says(several, world, dtype):
    for sent, said in (r[dtype] for r in several[world]):
        assert sent == {"alltoall_base_": said["gradients (gloo)"], "broadcast_": said["weights"]}
        assert said["gradients (nccl)"] >= said["gradients (gloo)"]


# ── schedules ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_learning_rate_goes_up_stays_and_comes_down():
    def rate(progress):
        return lr_multiplier_at(progress, warmup=0.1, cooldown=0.5, floor=0.2)

    assert [round(rate(p), 9) for p in (0, 0.05, 0.1, 0.3, 0.5, 0.75, 1)] == [0, 0.5, 1, 1, 1, 0.6, 0.2]
    assert [lr_multiplier_at(p) for p in (0, 0.4)] == [1, 1] and lr_multiplier_at(1) == 0


@pytest.mark.parametrize("schedule", [lr_multiplier_at, lambda p: lr_multiplier_at(p, 0.1, 0.5, 0.2)])
def test_schedules_do_not_jump(schedule):
    values = [schedule(i / 1000) for i in range(1001)]
    assert max(abs(a - b) for a, b in zip(values, values[1:])) <= 0.0100001
