"""Distillation: divergences against plain fp64 oracles, errors, and every kind at toy size, as a user runs it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nanoghost import cli
from nanoghost.data.conversations import load_conversations
from nanoghost.engine.sampler import SamplingParams
from nanoghost.home import ModelFolder
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.distill import tokenizer_difference
from nanoghost.train.distill_loss import (
    bucket_logprobs,
    distill_loss,
    divergence,
    merge_into_buckets,
    student_bucket_logprobs,
    teacher_buckets,
)
from nanoghost.train.distill_methods import accumulate_distill_gradients
from nanoghost.train.packing import TokenizedExample, collate, pack
from nanoghost.train.teacher_cache import generate_answers, teacher_targets
from tests.support.engine_toys import ScriptedModel
from tests.support.toys import TOY_FLAGS, toy_text
from tests.test_training import killed_after_checkpoint, losses

V, K = 50, 6
BETAS = (0.0, 0.3, 1.0)


def logits(rows: int = 20, seed: int = 0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def true_tokens(rows: int = 20):
    return torch.randint(V, (rows,), generator=torch.Generator().manual_seed(9))


def slow_divergence(student_NV, teacher_NV, ids_NK, beta: float) -> torch.Tensor:
    """The table of distill_loss.py, in a loop over the buckets."""
    divergences = []
    for q, p, ids in zip(student_NV.softmax(1), teacher_NV.softmax(1), ids_NK.tolist()):
        others = [v for v in range(V) if v not in ids]
        total = 0.0
        for bucket in ([i] for i in ids):
            total += term(p[bucket].sum(), q[bucket].sum(), beta)
        divergences.append(total + term(p[others].sum(), q[others].sum(), beta) if others else total)
    return torch.stack(divergences)


def term(p, q, beta):
    m = beta * p + (1 - beta) * q
    return p * (p / q).log() if beta == 0 else q * (q / p).log() if beta == 1 else (
        beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()
    )  # fmt: skip


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_k_most_probable_tokens_and_the_true_one_have_their_own_buckets():
    ids, buckets = teacher_buckets(logits(), true_tokens(), K)
    probs = logits().softmax(1)
    for n, target in enumerate(true_tokens().tolist()):
        best = probs[n].argsort(descending=True).tolist()[:K]
        assert set(ids[n].tolist()) == set(best if target in best else [*best[:-1], target])
    assert_close(buckets.exp().sum(1), torch.ones(20))
    assert_close(buckets[:, :-1].exp().double(), probs.gather(1, ids), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_gradient_equal_those_of_the_plain_sum(beta):
    """The chunked fp32 path from hidden states to one number, against fp64 without chunks."""
    ids, _ = teacher_buckets(logits(seed=1), true_tokens(), K)
    teacher = merge_into_buckets(logits(seed=1).log_softmax(1), ids)
    generator = torch.Generator().manual_seed(5)
    hidden, head = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (20, V))
    h64, w64 = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    h32, w32 = hidden.float().requires_grad_(), head.float().requires_grad_()
    plain = slow_divergence(h64 @ w64.T, logits(seed=1), ids, beta)
    ours = divergence(bucket_logprobs(h32, w32, ids), teacher, beta)
    assert_close(ours.double(), plain, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(0.1, 2, 20, dtype=torch.float64)
    (plain * weights).sum().backward()
    (ours * weights).sum().backward()
    assert_close(h32.grad.double(), h64.grad, rtol=1e-3, atol=1e-4)
    assert_close(w32.grad.double(), w64.grad, rtol=1e-3, atol=1e-4)


def test_the_size_of_the_chunks_does_not_change_the_gradient(monkeypatch):
    ids, _ = teacher_buckets(logits(), true_tokens(), K)
    results = []
    for positions in (20, 3):
        slices = [slice(i, i + positions) for i in range(0, 20, positions)]
        monkeypatch.setattr("nanoghost.train.distill_loss._chunks", lambda n, v, slices=slices: slices)
        h = torch.arange(20 * 4.0).view(20, 4).sin().requires_grad_()
        w = torch.arange(V * 4.0).view(V, 4).cos().requires_grad_()
        bucket_logprobs(h, w, ids).square().sum().backward()
        results.append((h.grad, w.grad))
    for one, other in zip(*results):
        assert_close(one, other)


@pytest.mark.parametrize("beta", BETAS)
def test_divergence_and_gradient_from_the_same_distribution_are_zero(beta):
    student = logits().requires_grad_()
    ids, _ = teacher_buckets(logits(), true_tokens(), K)
    own = merge_into_buckets(student.log_softmax(1), ids)
    d = divergence(own, own.detach(), beta)
    d.sum().backward()
    assert d.abs().max() < 1e-6 and student.grad.abs().max() < 1e-6
    other = divergence(merge_into_buckets(logits(seed=3).log_softmax(1), ids), own.detach(), beta)
    assert (other > 0).all()


def test_divergence_grows_with_the_number_of_buckets_to_the_exact_kl():
    student, teacher = logits().log_softmax(1), logits(seed=1).log_softmax(1)
    full = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    before = torch.zeros(20, dtype=torch.float64)
    for k in (1, 5, 20, V):
        ids, buckets = teacher_buckets(logits(seed=1), teacher.argmax(1), k)
        d = divergence(merge_into_buckets(student, ids), buckets, 0.0).double()
        assert (d >= before - 1e-5).all()
        before = d
    assert_close(before, full, rtol=1e-4, atol=1e-5)


def test_with_teacher_weight_0_it_is_cross_entropy_and_with_another_the_weighted_sum():
    ids, buckets = teacher_buckets(logits(seed=1), true_tokens(), K)
    student = merge_into_buckets(logits().log_softmax(1), ids)
    plain = F.cross_entropy(logits(), true_tokens(), reduction="none")
    assert_close(distill_loss(student, buckets, ids, true_tokens(), 0.0, 0.0).double(), plain, rtol=1e-5, atol=1e-5)
    both = distill_loss(student, buckets, ids, true_tokens(), 0.0, 0.25)
    assert_close(both.double(), 0.75 * plain + 0.25 * divergence(student, buckets, 0.0), rtol=1e-5, atol=1e-5)


# -- models -----------------------------------------------------------------------------------------------------------


def toy_model(kind: str, seed: int):
    torch.manual_seed(seed)
    if kind == "llama":
        model = Llama(LlamaConfig(61, 32, 1, 32, 2, 1, 64))
    else:
        model = Ghost(GhostConfig(vocab_size=61, context=32, depth=1, width=32, head_width=16, bigram_rows=64))
        model.character_table[:, :6] = torch.randint(1, 3, (61, 6), dtype=torch.int32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def toy_batch():
    generator = torch.Generator().manual_seed(0)
    examples = [
        TokenizedExample(torch.randint(61, (n,), generator=generator).tolist(), [False] * 2 + [True] * (n - 2))
        for n in (33, 20, 9, 25, 12)
    ]
    rows = pack([len(example.ids) for example in examples], 33, range(len(examples)))
    return collate(rows, examples, 32, sum(sum(example.loss_mask) for example in examples))


@pytest.mark.parametrize("kind", ["llama", "ghost"])
def test_student_buckets_equal_those_of_the_whole_distribution(kind):
    model = toy_model(kind, 0)
    inputs, targets, weights, segments = toy_batch()
    places = (weights > 0).nonzero(as_tuple=True)
    dense = model(inputs, segments_BT=segments)[places].log_softmax(1)
    ids, buckets = teacher_buckets(dense, targets[places], K)
    assert_close(student_bucket_logprobs(model, inputs, ids, segments, places), buckets, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "ghost"])
@pytest.mark.parametrize("beta", BETAS)
def test_a_student_learns_the_distribution_of_its_teacher(kind, beta):
    batch = toy_batch()
    targets = teacher_targets(toy_model("ghost", 1), batch, top_k=K, vocab_size=61)
    student = toy_model(kind, 2)
    optimizer = torch.optim.Adam(student.parameters(), 0.02)
    losses = []
    for _ in range(60):
        losses.append(accumulate_distill_gradients(student, batch, targets, beta, teacher_weight=1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.1 * losses[0]


# -- the stage --------------------------------------------------------------------------------------------------------

SMALL = ("--context", 64, "--batch", 4, "--examples", 20, "--max-tokens", 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A home with three models: toy (the teacher), nano with the same tokenizer, and other with another tokenizer."""
    folder = tmp_path_factory.mktemp("distill")
    text = folder / "notes.txt"
    text.write_text(toy_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(folder / "home"))
        for name, words in (
            ("toy", (*TOY_FLAGS, "--steps", 12)),
            ("nano", (*TOY_FLAGS, "--steps", 1, "--depth", 1, "--arch", "llama", "--tokenizer", "toy")),
            ("other", (*TOY_FLAGS, "--steps", 12, "--vocab-size", 300)),
        ):
            cli.main(["pretrain", "--data", str(text), "--name", name, *map(str, words)])
    return folder


@pytest.fixture
def distill(models, home, nanoghost):
    """Run `distill` in a copy of that home; returns the figures, or the last line of the error."""
    shutil.copytree(models / "home", home)

    def run(student, *words):
        code, out, err = nanoghost("distill", student, *SMALL, *words, "--json")
        assert code in (0, 2) and "Traceback" not in err, err
        return json.loads(out) if code == 0 else err.strip().splitlines()[-1]

    return run


def test_kind_token_learns_the_cached_probabilities_and_recomputes_only_missing_files(distill, models, home, nanoghost):
    common = ("--teacher", "toy", "--kind", "token", "--data", models / "notes.txt")
    figures = distill("nano", *common, "--name", "with", "--steps", 40, "--teacher-weight", 1)
    assert {"name", "parameters", "tokens", "seconds", "tokens_per_second", "flops_per_second", "bpb"} <= set(figures)
    assert figures["tokens"] == 40 * 4 * 64
    by_step = losses("with", "distill")
    assert by_step[39] < 0.5 * by_step[0]
    first, *others = sorted(home.glob("data/probabilities-*/*"))
    times, content = [path.stat().st_mtime_ns for path in others], first.read_bytes()
    first.unlink()
    assert distill("nano", *common, "--name", "without", "--steps", 2, "--teacher-weight", 0)["name"] == "without"
    assert first.read_bytes() == content, "a missing file is computed again, with the same content"
    assert others and times == [path.stat().st_mtime_ns for path in others], "the other files are reused"
    card = ModelFolder("with").card
    assert card.teacher.name == "toy"
    assert card.parent.name == "nano"
    code, _, err = nanoghost("report", "with")
    assert code == 0, err


def test_kind_sequence_caches_the_answers_as_conversations_and_learns_them(distill, home, tmp_path, nanoghost):
    """The tokenizers differ. The teacher always gives the same answer, so that a toy student can learn it."""
    chats, prompts = tmp_path / "chats.jsonl", tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "king?"}, {"role": "assistant", "content": "The king sees."}]
    chats.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))
    prompts.write_text("".join(json.dumps({"messages": turns[:1]}) + "\n" for _ in range(20)))
    assert nanoghost("sft", "toy", "--name", "teacher", "--data", chats, "--steps", 40, "--batch", 4)[0] == 0
    words = ("--teacher", "teacher", "--data", prompts, "--temperature", 0)
    figures = distill("other", *words, "--name", "pupil", "--steps", 60)
    assert figures["teacher"] == "teacher" and figures["loss"] < 0.5
    [path] = home.glob("data/answers-*/answers.jsonl")
    assert [c[-1] for c in load_conversations(path)] == [turns[1]] * 20
    assert nanoghost("chat", "pupil", "--prompt", "king?", "--temperature", 0)[1] == "The king sees."
    assert "--max-tokens" in distill("other", *words, "--name", "short", "--max-tokens", 2)


@pytest.mark.parametrize("answer, is_kept", [("Yes.", True), ("<tool_call>{1}</tool_call>", False)])
def test_an_answer_with_a_call_that_cannot_be_read_is_left_out(answer, is_kept):
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    question = [{"role": "user", "content": "?"}]
    prompt, _ = render(question, tokenizer, add_generation_prompt=True)
    model = ScriptedModel(tokenizer, prompt, [*tokenizer.encode(answer), tokenizer.special_id("<|im_end|>")])
    conversations = generate_answers(model, tokenizer, [question], SamplingParams(max_tokens=40, temperature=0))
    assert [messages[-1]["content"] for messages in conversations] == [answer] * is_kept


def test_kind_on_policy_reduces_the_divergence_on_the_students_samples(distill, models):
    common = ("--teacher", "toy", "--kind", "on-policy", "--learning-rate", 0.5)
    distill("nano", *common, "--name", "pupil", "--data", models / "notes.txt", "--steps", 30)
    values = list(losses("pupil", "distill").values())
    assert sum(values[-5:]) < 0.5 * sum(values[:5])
    figures = distill("toy", *common, "--name", "itself", "--steps", 2)  # the built-in questions; a Ghost as student
    assert figures["loss"] < 0.02, "a model does not diverge from itself"


@pytest.mark.parametrize("kind", ["token", "on-policy"])
def test_an_adapter_can_be_student_and_teacher(distill, models, kind):
    common = ("--kind", kind, "--data", models / "notes.txt", "--steps", 6)
    assert distill("nano", *common, "--teacher", "toy", "--name", "taught", "--lora", 4)["name"] == "nano@taught"
    assert distill("nano@taught", *common, "--teacher", "toy", "--name", "more")["name"] == "nano@more"
    assert ModelFolder("nano@more").card.adapters[0]["rank"] == 4
    figures = distill("nano", *common, "--teacher", "nano@more", "--name", "pupil", "--teacher-weight", 1)
    assert figures["loss"] < losses("nano@taught", "distill")[0], "an adapter is closer to its base than toy is"


@pytest.mark.parametrize("kind", ["token", "on-policy"])
def test_distillation_resumes_after_kill_9_bit_for_bit(distill, models, nanoghost, kind):
    common = ("distill", "nano", "--teacher", "toy", "--kind", kind, "--data", models / "notes.txt", *SMALL,
              "--steps", 25)  # fmt: skip
    assert nanoghost(*common, "--name", "whole")[0] == 0
    killed_after_checkpoint(*common, "--name", "killed")
    assert nanoghost(*common, "--name", "killed")[0] == 0
    assert losses("killed", "distill") == losses("whole", "distill")
    weights = [(ModelFolder(name).path / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_two_processes_have_the_losses_of_one(distill, models):
    common = ("--teacher", "toy", "--kind", "token", "--data", models / "notes.txt", "--steps", 4)
    distill("nano", *common, "--name", "one")
    torchrun = (sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2 -m nanoghost".split())
    words = map(str, ("distill", "nano", *SMALL, *common, "--name", "two"))
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = losses("one", "distill"), losses("two", "distill")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=5e-3) and len(two) == 4


@pytest.mark.parametrize(
    "words, hint",
    [
        (("--teacher", "other", "--kind", "token"), "300"),
        (("--teacher", "other", "--kind", "on-policy"), "--tokenizer other"),
        (("--teacher", "nobody"), "nobody"),
        (("--teacher", "toy", "--kind", "magic"), "magic"),
        (("--teacher", "toy", "--data", "TEXT"), "sequence"),
        (("--teacher", "toy", "--kind", "token", "--beta", 2), "--beta"),
        (("--teacher", "toy", "--kind", "token", "--data", "none.txt"), "none.txt"),
        (("--teacher", "toy", "--kind", "token", "--data", "none.jsonl"), "none.jsonl"),
    ],
)
def test_unsuitable_teachers_settings_and_data_are_refused(distill, models, words, hint):
    words = [models / "notes.txt" if word == "TEXT" else word for word in words]
    assert hint in distill("nano", "--name", "pupil", "--steps", 2, *words)
    assert not ModelFolder("pupil").path.exists()


def test_tokenizers_with_the_same_size_and_other_tokens_differ(models):
    student, other = Tokenizer.load(models / "home/models/toy"), Tokenizer.load(models / "home/models/other")
    assert tokenizer_difference(student, student) == ""
    assert "300" in tokenizer_difference(student, other)
    same_size = Tokenizer.train([toy_text(seed=1).replace("king", "wolf")], 320)
    assert re.match(r"token \d+ is b'", tokenizer_difference(student, same_size))
