"""Mixtures: rows exactly by weight, each source with its own epochs, for any number of processes."""

import json

import numpy as np
import pytest

from nanoghost.data.batches import Batches
from nanoghost.data.local import open_local
from nanoghost.data.mixed_batches import BLOCK, MixedBatches, rows_per_block
from nanoghost.data.registry import open_data_source
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.errors import UserError
from tests.support.toys import TOY_FLAGS, toy_text
from tests.test_data import ByteTokenizer
from tests.test_remote import write


def mixed_batches(lengths=(5000, 900, 3000), weights=(0.7, 0.2, 0.1), context=8, rows=16, seed=3, rank=0, world_size=1):
    tokens = np.concatenate([np.arange(n) + 10_000 * i for i, n in enumerate(lengths)]).astype("u2")
    parts = [{"tokens": n, "weight": w} for n, w in zip(lengths, weights)]
    return MixedBatches(tokens, parts, context, rows, seed, rank, world_size)


def test_rows_of_a_mixture_are_exactly_by_weight():
    batches = mixed_batches(rows=20)
    part = np.concatenate([batches.at(step)[0][:, 0].numpy() // 10_000 for step in range(2 * BLOCK // 20)])
    for block in part.reshape(2, BLOCK):
        assert np.bincount(block).tolist() == [700, 200, 100]
    assert (part[:BLOCK] != part[BLOCK:]).any()


def test_each_source_of_a_mixture_keeps_its_own_epochs():
    batches = mixed_batches()
    starts = np.concatenate([batches.row_starts(step) for step in range(500)])
    for p, length in enumerate((5000, 900, 3000)):
        of_source = starts[(starts >= batches.offsets[p]) & (starts < batches.offsets[p] + length)] - batches.offsets[p]
        alone = Batches(batches.tokens[batches.offsets[p] :][:length], 8, 1, 3)
        assert (of_source == alone.starts_of(np.arange(len(of_source)))).all()
    inputs, targets = batches.at(7)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    assert (targets - inputs == 1).all()  # no row crosses a border


def test_batches_of_a_mixture_depend_on_the_step_alone():
    whole = mixed_batches()
    steps = [whole.at(step)[0] for step in range(100)]
    for world_size in (2, 4):
        ranks = [mixed_batches(rank=rank, world_size=world_size) for rank in range(world_size)]
        for step in (0, 99, 40):  # any step at once
            rows = [r.at(step)[0] for r in ranks]
            assert all((rows[rank] == steps[step][rank::world_size]).all() for rank in range(world_size))


def test_rows_per_block_are_the_nearest_whole_numbers():
    for weights in ((1, 1, 1), (0.7, 0.3), (5, 1e-2), (3, 1, 4, 1, 5, 9, 2, 6)):
        rows = rows_per_block(weights)
        assert rows.sum() == BLOCK
        assert (abs(rows - np.array(weights) / sum(weights) * BLOCK) < 1).all()


def test_a_mixture_is_a_source(tmp_path):
    write(tmp_path / "notes", count=2)
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {i}.\n\n" for i in range(200)))
    spec = f"{tmp_path}/notes=3,{tmp_path}/book.txt=1"
    source = open_data_source(spec)
    parts = [open_local(tmp_path / name) for name in ("notes", "book.txt")]
    assert list(source.documents()) == [d for part in parts for d in part.documents()]
    assert source.fingerprint != open_data_source(spec.replace("=3", "=2")).fingerprint
    assert "75.0% local text 'notes'" in source.attribution
    assert source.license == "unknown (local files)"
    mixture, alone = (
        tokenize_source(source, ByteTokenizer()),
        [tokenize_source(part, ByteTokenizer()) for part in parts],
    )
    for split in ("train", "val", "test"):
        assert mixture.tokens(split).tolist() == [t for part in alone for t in part.tokens(split).tolist()]
        assert mixture.bytes(split) == sum(part.bytes(split) for part in alone)
    assert mixture.batches(16, 4, 0).quotas.tolist() == [750, 250]


def test_pretraining_on_a_mixture_stores_it_in_the_card(tmp_path, nanoghost, home):
    for name, sentences in (("a", 600), ("b", 300)):
        (tmp_path / f"{name}.txt").write_text(toy_text(sentences))
    spec = f"{tmp_path}/a.txt=0.7,{tmp_path}/b.txt=0.3"
    code, _, err = nanoghost("pretrain", "--data", spec, "--name", "mixed", "--steps", 2, *TOY_FLAGS)
    assert code == 0, err
    card = json.loads((home / "models" / "mixed" / "card.json").read_text())
    assert card["data"][0]["attribution"] == "70.0% local text 'a.txt'; 30.0% local text 'b.txt'"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{a}=1", "is not a mixture: name two or more"),
        ("{a}=1,{a}=2", "is not a mixture: name two or more different"),
        ("{a}=1,{b}=0.0001", "at least a thousandth"),
        ("{a}=0,{b}=0", "at least a thousandth"),
        ("{a}=1,nowhere=1", "no data called 'nowhere'"),
    ],
)
def test_errors_of_mixtures(tmp_path, spec, message):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("text " * 100)
    with pytest.raises(UserError, match=message):
        open_data_source(spec.format(a=tmp_path / "a", b=tmp_path / "b"))
