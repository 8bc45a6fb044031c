"""The optimizer against slow oracles (singular values by SVD, one matrix at a time, PyTorch's AdamW), and several
processes against one."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nanoghost import distributed, hardware
from nanoghost.data.batches import Batches
from nanoghost.model.ghost import Ghost
from nanoghost.optim.collectives import communication_bytes
from nanoghost.optim.optimizer import POLAR_EXPRESS, Bucket, UpdateRule, orthogonalize
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.train.pretrain import accumulate_gradients
from tests.support.ranks import in_ranks
from tests.support.toy_training import STEPS, flat_parameters, toy_ghost, toy_optimizer, toy_tokens, train_steps

# ── one matrix ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows, columns", [(48, 16), (16, 48), (32, 32)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_the_singular_vectors(rows, columns):
    torch.manual_seed(0)
    rank = min(rows, columns)
    u = torch.linalg.qr(torch.randn(3, rows, rank)).Q
    v = torch.linalg.qr(torch.randn(3, columns, rank)).Q
    s = torch.logspace(0, -2.5, rank)  # the largest is 300 times the smallest
    result = u.mT @ orthogonalize(u * s @ v.mT) @ v
    singular_values = result.diagonal(dim1=-2, dim2=-1)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.25
    assert (result - torch.diag_embed(singular_values)).abs().max() < 1e-3


def test_orthogonalize_does_not_depend_on_the_scale():
    g = torch.randn(2, 8, 8)
    assert_close(orthogonalize(g * 1000), orthogonalize(g), rtol=1e-3, atol=1e-3)


def test_orthogonalize_leaves_zero_at_zero():
    assert orthogonalize(torch.zeros(1, 8, 8)).count_nonzero() == 0


def slow_orthogonalize(g):
    """The polynomials of Polar Express on the singular values themselves, in fp64."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / (s.norm() * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ vt


# ── one bucket ────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def parameters_after_steps(bucket: Bucket, gradients, lr_multipliers):
    """Yield the bucket's parameters after a step with each of the gradients."""
    for step, (step_gradients, lr_multiplier) in enumerate(zip(gradients, lr_multipliers), 1):
        for p, g in zip(bucket.parameters, step_gradients):
            p.grad = g.clone()
        bucket.step(lr_multiplier, step)
        yield [p.detach().clone() for p in bucket.parameters]


def make_bucket(start, matrix_shape, rule: UpdateRule) -> Bucket:
    parameters = [p.clone().requires_grad_() for p in start]
    return Bucket(parameters, matrix_shape, rule, rank=0, world_size=1, compute_dtype=torch.float32)


def test_adamw_equals_that_of_pytorch():
    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(3), torch.randn(2, 2, 2)]
    scales = torch.logspace(-6, 2, 7)  # columns whose gradients are tiny and huge
    gradients = [[torch.randn(5, 7) * scales, torch.randn(3), torch.randn(2, 2, 2)] for _ in range(100)]
    for step_gradients in gradients:
        step_gradients[0][0] = 0  # an embedding row that never occurs
    bucket = make_bucket(start, (), UpdateRule("adamw", 0.02, 0.8, 0.95))
    expected = [p.clone().requires_grad_() for p in start]
    reference = torch.optim.AdamW(expected, lr=0.02, betas=(0.8, 0.95), eps=1e-10, weight_decay=0)
    lr_multipliers = torch.linspace(1, 0, 100).tolist()
    for step, parameters in enumerate(parameters_after_steps(bucket, gradients, lr_multipliers)):
        reference.param_groups[0]["lr"] = 0.02 * lr_multipliers[step]
        for p, g in zip(expected, gradients[step]):
            p.grad = g.clone()
        reference.step()
        assert_close(parameters, [p.detach() for p in expected], rtol=1e-4, atol=1e-6)
    assert_close(parameters[0][0], start[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("rows, columns", [(12, 6), (6, 12), (8, 8)])
def test_muon_updates_stacked_matrices_one_by_one(rows, columns):
    """A weight of three stacked matrices, like a fused qkv, and a single matrix: against a loop over four matrices."""
    torch.manual_seed(0)
    start = [torch.randn(3 * rows, columns), torch.randn(rows, columns)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(100)]
    lr_multipliers = torch.linspace(1, 0.1, 100).tolist()
    momentum, beta2, weight_decay = 0.9, 0.9, 0.5
    bucket = make_bucket(start, (rows, columns), UpdateRule("muon", 0.02, momentum, beta2, weight_decay))

    weights = [m.double() for p in start for m in p.split(rows)]
    first_moments = [torch.zeros(rows, columns, dtype=torch.float64) for _ in weights]
    second_moments = [torch.zeros(rows, 1, dtype=torch.float64) for _ in weights]
    for step, parameters in enumerate(parameters_after_steps(bucket, gradients, lr_multipliers)):
        lr = 0.02 * lr_multipliers[step] * max(1, rows / columns) ** 0.5
        matrix_gradients = [m.double() for p in gradients[step] for m in p.split(rows)]
        for i, g in enumerate(matrix_gradients):
            first_moments[i] = momentum * first_moments[i] + (1 - momentum) * g
            update = slow_orthogonalize(momentum * first_moments[i] + (1 - momentum) * g)  # Nesterov
            second_moments[i] = beta2 * second_moments[i] + (1 - beta2) * update.square().mean(1, keepdim=True)
            scaled = update / (second_moments[i] / (1 - beta2 ** (step + 1))).sqrt()  # NorMuon
            update = scaled * update.norm() / scaled.norm()
            decay = weight_decay * torch.where(update * weights[i] > 0, weights[i], 0)  # cautious
            weights[i] = weights[i] - lr * (update + decay)
        assert_close(torch.cat(parameters).double(), torch.cat(weights), rtol=1e-4, atol=1e-4)


# ── a model ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_parameter_is_in_exactly_one_bucket():
    model = toy_ghost()
    in_buckets = [id(p) for bucket in toy_optimizer(model).buckets.values() for p in bucket.parameters]
    assert sorted(in_buckets) == sorted(id(p) for p in model.parameters())


def test_qkv_and_out_of_a_ghost_share_a_bucket_of_square_matrices():
    """Two layers of four matrices: the optimizer takes the fused qkv for three."""
    bucket = toy_optimizer(toy_ghost(depth=2)).buckets["matrices.32x32"]
    assert bucket.master.shape == (2 * 4, 32, 32)


def test_a_step_changes_all_parameters_and_clears_their_gradients():
    model = toy_ghost()
    optimizer = toy_optimizer(model)
    before = [p.detach().clone() for p in model.parameters()]
    model = model.to(hardware.device())
    train_steps(model, optimizer, Batches(toy_tokens(), 16, 4, seed=0), range(2))
    assert all((p.cpu() != old).any() for p, old in zip(model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_bf16_weights_are_their_fp32_masters_rounded():
    model = toy_ghost().cast(torch.bfloat16)
    optimizer = toy_optimizer(model, torch.bfloat16)
    train_steps(model, optimizer, Batches(toy_tokens(), 16, 4, seed=0), range(5))
    for bucket in optimizer.buckets.values():
        weights = torch.cat([p.detach().flatten() for p in bucket.parameters])
        assert bucket.master.dtype == torch.float32
        assert torch.equal(weights, bucket.master.flatten().to(weights.dtype))
    assert model.dtype == torch.bfloat16
    assert (optimizer.buckets["head.torch.bfloat16"].master != model.head.weight.flatten()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_with_a_restored_state_continues_bit_for_bit(dtype):
    batches = Batches(toy_tokens(), 16, 4, seed=0)
    model = toy_ghost().cast(dtype)
    optimizer = toy_optimizer(model, dtype)
    train_steps(model, optimizer, batches, range(4))
    state = {k: t.clone() for k, t in optimizer.state().items()}

    restored = Ghost(model.config).cast(dtype)  # other random weights
    restored.character_table.copy_(model.character_table)
    restored_optimizer = toy_optimizer(restored, dtype)
    restored_optimizer.load_state(state)
    assert torch.equal(flat_parameters(restored), flat_parameters(model))
    train_steps(model, optimizer, batches, range(4, 8))
    train_steps(restored, restored_optimizer, batches, range(4, 8))
    assert torch.equal(flat_parameters(restored), flat_parameters(model))
    assert all(torch.equal(t, optimizer.state()[k]) for k, t in restored_optimizer.state().items())


# ── several processes ─────────────────────────────────────────────────────────────────────────────────────────────────

WORLD_SIZES = (
    2,
    3,
    4,
)  # the number of square matrices, of other matrices, and of scalars is not divisible by all of them


class BytesSent(TorchDispatchMode):
    """Counts the bytes that leave this process in collectives between `world_size` ranks: all but its own part."""

    def __init__(self, world_size: int):
        super().__init__()
        self.world_size = world_size
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        if name == "alltoall_base_":
            self.count(name, args[1])
        elif name == "broadcast_" and args[2] == dist.get_rank():  # to each of the others
            self.count(name, args[0][0], self.world_size)
        return function(*args, **(kwargs or {}))

    def count(self, name: str, tensor, times: int = 1) -> None:
        sent = tensor.numel() * tensor.element_size() * times * (self.world_size - 1) // self.world_size
        self.bytes[name] = self.bytes.get(name, 0) + sent


def train_in_a_rank(folder: str) -> None:
    """Fifty steps in several micro-batches; half way, the state moves to a new model and optimizer."""
    torch.set_num_threads(1)
    distributed.init_distributed()
    rank, world_size = distributed.rank_and_world_size()
    batches = Batches(toy_tokens(), 16, 12, 0, rank, world_size)
    model = toy_ghost(1)
    optimizer = toy_optimizer(model, rank=rank, world_size=world_size)
    losses = train_steps(model, optimizer, batches, range(STEPS // 2))
    state, model = optimizer.state(), toy_ghost(1)
    optimizer = toy_optimizer(model, rank=rank, world_size=world_size)
    optimizer.load_state(state)
    losses += train_steps(model, optimizer, batches, range(STEPS // 2, STEPS))
    result = figures_of(losses, model, optimizer, batches)
    for dtype in (torch.float32, torch.bfloat16):
        model = toy_ghost(1).cast(dtype)
        optimizer = toy_optimizer(model, dtype, rank, world_size)
        accumulate_gradients(model, *batches.at(0), micro_batch=2)
        with BytesSent(world_size) as sent:
            optimizer.step()
        result[str(dtype)] = sent.bytes, communication_bytes(optimizer.buckets.values(), world_size)
    torch.save(result, f"{folder}/{world_size}-{rank}.pt")
    dist.destroy_process_group()


def figures_of(losses, model, optimizer, batches) -> dict:
    return {
        "losses": losses,
        "parameters": flat_parameters(model),
        "rows of step 7": batches.row_starts(7).tolist(),
        "state size": sum(t.numel() for t in optimizer.state().values()),
    }


@pytest.fixture(scope="module")
def results_of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks("tests.test_optimizer:train_in_a_rank", WORLD_SIZES, folder)
    return {n: [torch.load(folder / f"{n}-{rank}.pt") for rank in range(n)] for n in WORLD_SIZES}


@pytest.fixture(params=WORLD_SIZES)
def ranks(request, results_of_ranks):
    """The results of all ranks of one run."""
    return results_of_ranks[request.param]


@pytest.fixture(scope="module")
def single():
    model = toy_ghost(1)
    optimizer = toy_optimizer(model)
    batches = Batches(toy_tokens(), 16, 12, 0)
    losses = train_steps(model, optimizer, batches, range(STEPS))
    return figures_of(losses, model, optimizer, batches)


def test_ranks_agree_bit_for_bit(ranks):
    for result in ranks:
        assert result["losses"] == ranks[0]["losses"]
        assert torch.equal(result["parameters"], ranks[0]["parameters"])


def test_ranks_train_as_a_single_process_does(ranks, single):
    assert single["losses"][-1] < single["losses"][0] - 0.1
    assert_close(torch.tensor(ranks[0]["losses"]), torch.tensor(single["losses"]), rtol=1e-5, atol=0)
    difference = ranks[0]["parameters"] - single["parameters"]
    assert difference.norm() < 1e-5 * single["parameters"].norm()


def test_each_rank_holds_its_share_of_the_optimizer_state(ranks, single):
    assert all(result["state size"] < (1.2 / len(ranks)) * single["state size"] for result in ranks)


def test_ranks_together_read_the_rows_of_a_single_process(ranks, single):
    rows = [result["rows of step 7"] for result in ranks]
    assert [rows[i % len(ranks)][i // len(ranks)] for i in range(12)] == single["rows of step 7"]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_rank_sends_as_many_bytes_as_communication_bytes_predicts(ranks, dtype):
    for sent, predicted in (result[dtype] for result in ranks):
        assert sent == {"alltoall_base_": predicted["gradients (gloo)"], "broadcast_": predicted["weights"]}
        assert predicted["gradients (nccl)"] >= predicted["gradients (gloo)"]


# ── schedule ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "progress, expected", [(0, 0), (0.05, 0.5), (0.1, 1), (0.3, 1), (0.5, 1), (0.75, 0.6), (1, 0.2)]
)
def test_learning_rate_rises_stays_constant_and_falls_to_the_floor(progress, expected):
    assert round(lr_multiplier_at(progress, warmup=0.1, cooldown=0.5, floor=0.2), 9) == expected


@pytest.mark.parametrize("progress, expected", [(0, 1), (0.4, 1), (1, 0)])
def test_default_schedule_has_no_warmup_and_falls_to_zero(progress, expected):
    assert lr_multiplier_at(progress) == expected


@pytest.mark.parametrize("arguments", [(), (0.1, 0.5, 0.2)])
def test_schedule_has_no_jumps(arguments):
    values = [lr_multiplier_at(i / 1000, *arguments) for i in range(1001)]
    assert max(abs(a - b) for a, b in pairwise(values)) <= 0.0100001
