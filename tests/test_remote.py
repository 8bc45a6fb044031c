"""Text from elsewhere, and mixtures: the same documents whatever fails, a bounded cache, rows exactly by weight."""

import json
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nanoghost.data import download_cache, hub, retry
from nanoghost.data import tokenize_source as tokenizing
from nanoghost.data.batches import Batches
from nanoghost.data.download_cache import DownloadCache, RemoteFile
from nanoghost.data.local import open_local
from nanoghost.data.mixed_batches import BLOCK, MixedBatches, rows_per_block
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.errors import UserError
from tests.support.toys import TOY_FLAGS, toy_text
from tests.test_data import ByteTokenizer


class Flaky(MemoryFileSystem):
    """Files in memory behind a line that fails: every request in `failures` does, counted over all."""

    protocol = "flaky"
    cachable = False
    requests, failures = [], ()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.requests.append((path, start, end))
        if len(Flaky.requests) in Flaky.failures:
            raise TimeoutError("the line is dead")
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    Flaky.requests, Flaky.failures = [], ()
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder, count: int = 3, rows: int = 12) -> None:
    folder.mkdir()
    for i in range(count):
        (folder / f"part-{i}.jsonl").write_bytes(lines(*(f"document {row} of part {i}" for row in range(rows)), ""))


def upload(fs, folder, to: str) -> None:
    for file in folder.iterdir():
        fs.pipe_file(f"{to}/{file.name}", file.read_bytes())


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_lies_elsewhere_reads_as_if_it_were_here(tmp_path, elsewhere):
    import pyarrow as pa
    from pyarrow import parquet

    write(tmp_path / "text")
    parquet.write_table(pa.table({"text": ["seven", "eight"]}), tmp_path / "text" / "z.parquet")
    (tmp_path / "text" / "notes.md").write_text("# nine")
    (tmp_path / "text" / ".hidden.txt").write_text("no")
    here = list(open_local(tmp_path / "text").documents())
    upload(elsewhere, tmp_path / "text", "/bucket/text")
    for url in ("memory://bucket/text", "flaky://bucket/text", f"file://{tmp_path}/text"):
        assert list(open_source(url).documents()) == here, url
    assert open_source("memory://bucket/text").fingerprint == open_source("flaky://bucket/text").fingerprint
    some = open_source("memory://bucket/text/part-*.jsonl")
    assert len(list(some.documents())) == 36 and some.name == "part" and some.license.startswith("unknown")
    assert "".join(d.text for d in open_source("memory://bucket/text/notes.md").documents()) == "# nine"
    elsewhere.pipe_file("/bucket/text/part-0.jsonl", lines("other"))
    assert open_source("memory://bucket/text").fingerprint != open_source("flaky://bucket/text/part-*").fingerprint


def test_a_line_that_fails_now_and_then_loses_nothing(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(download_cache, "CHUNK", 100)
    write(tmp_path / "text")
    upload(elsewhere, tmp_path / "text", "/bucket/text")
    Flaky.failures = {1, 2, 3, 4, 5, 7, 9, 10, 15}
    assert list(open_source("flaky://bucket/text").documents()) == list(open_local(tmp_path / "text").documents())
    done = [request for i, request in enumerate(Flaky.requests, 1) if i not in Flaky.failures]
    assert len(done) == len(set(done))  # nothing was fetched twice
    Flaky.failures = range(10**6)
    elsewhere.pipe_file("/bucket/text/part-0.jsonl", lines("new"))
    with pytest.raises(UserError, match="cannot read /bucket/text/part-0.jsonl, tried 6 times: the line is dead"):
        list(open_source("flaky://bucket/text").documents())


def test_what_was_fetched_before_a_kill_is_not_fetched_again(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(download_cache, "CHUNK", 10)
    elsewhere.pipe_file("/a.txt", b"0123456789" * 5)

    class Killed(Flaky):
        def cat_file(self, path, start=None, end=None, **kwargs):
            if start == 30:
                raise KeyboardInterrupt
            return super().cat_file(path, start, end)

    cache, file = DownloadCache(tmp_path / "cache", 1000), RemoteFile("/a.txt", 50, "1")
    with pytest.raises(KeyboardInterrupt):
        cache.fetch(Killed(), file)
    Flaky.requests = []
    assert cache.fetch(Flaky(), file).read_bytes() == b"0123456789" * 5
    assert [start for _, start, _ in Flaky.requests] == [30, 40]


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path, elsewhere):
    for name in "abcd":
        elsewhere.pipe_file(f"/{name}.txt", name.encode() * 100)
    cache = DownloadCache(tmp_path / "cache", 250)

    def held():
        return "".join(sorted(p.read_text()[0] for p in cache.folder.iterdir()))

    for step, (name, expected) in enumerate(
        [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("d", "cd"), ("a", "ad")]
    ):
        file = cache.fetch(elsewhere, RemoteFile(f"/{name}.txt", 100, "1"))
        os.utime(file, (step, step))  # clocks of file systems are coarse
        assert held() == expected
        assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= 250
    with pytest.raises(UserError, match="/big.txt has 251 bytes, the cache 250: set NANOGHOST_CACHE_GB"):
        cache.fetch(elsewhere, RemoteFile("/big.txt", 251, "1"))


def test_reading_goes_on_at_any_document_without_the_files_before_it(tmp_path, elsewhere, home):
    write(tmp_path / "text", count=4, rows=30)
    upload(elsewhere, tmp_path / "text", "/bucket/text")
    source = open_source("flaky://bucket/text")
    documents = list(source.documents())
    for skip in (0, 1, 19, 20, 29, 30, 31, 60, 75, 119, 120):
        assert list(source.documents(skip)) == documents[skip:], skip
    for file in (home / "data" / "cache").glob("*.jsonl"):
        file.unlink()
    Flaky.requests = []
    assert list(source.documents(95)) == documents[95:]
    # The first file says what is held out in any case; the second and third are not needed.
    assert [path for path, *_ in Flaky.requests] == ["/bucket/text/part-0.jsonl", "/bucket/text/part-3.jsonl"]


def test_mistakes_in_urls_are_named(elsewhere, monkeypatch):
    with pytest.raises(UserError, match="memory://nowhere: no .txt, .md, .jsonl, .parquet file there"):
        open_source("memory://nowhere")
    with pytest.raises(UserError, match="nothing://x: Protocol not known: nothing"):
        open_source("nothing://x")
    elsewhere.pipe_file("/bad.jsonl", b"{")
    with pytest.raises(UserError, match="^/bad.jsonl: .*not JSON"):
        list(open_source("memory://bad.jsonl").documents())
    monkeypatch.setenv("NANOGHOST_CACHE_GB", "much")
    with pytest.raises(UserError, match="NANOGHOST_CACHE_GB is 'much', not a number"):
        open_source("memory://bad.jsonl")


# ── the Hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_is_read_up_to_a_limit_and_licenses_warn(monkeypatch, capsys, elsewhere):
    """Our side of the Hub: its file system is one in memory, the card has its shape."""
    for i in range(3):
        rows = lines(*(f"row {i}{j:03}" for j in range(100)))
        elsewhere.pipe_file(f"/datasets/owner/name@abc123/sample/train-{i}.jsonl", rows)
    elsewhere.pipe_file("/datasets/owner/name@abc123/sample/test-0.jsonl", lines("held out"))
    elsewhere.pipe_file("/datasets/owner/name@abc123/README.md", b"# a card")
    configs = [{"config_name": "small", "data_files": [{"split": "train", "path": "sample/train-*"}]}]
    info = SimpleNamespace(sha="abc123", card_data={"license": "cc-by-nc-4.0", "configs": configs})
    api = SimpleNamespace(dataset_info=lambda name, timeout: info)
    stand_in = SimpleNamespace(HfApi=lambda: api, HfFileSystem=lambda: elsewhere)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    source = hub.open_hub("hub:owner/name:small", max_bytes=1600)
    assert len(list(source.documents())) == 200  # 8 bytes each
    assert [d.text for d in source.documents(150)] == [f"row 1{j:03}" for j in range(50, 100)]
    assert source.name == "owner--name-small" and source.license == "cc-by-nc-4.0"
    assert "at revision abc123" in source.attribution and "may not be used commercially" in capsys.readouterr().err


@pytest.mark.parametrize(
    "configs, config, expected",
    [
        ([], "", ["data/train-0.parquet", "b/train.jsonl"]),
        ([], "b", ["b/train.jsonl"]),
        ([{"config_name": "b", "data_dir": "b"}], "b", ["b/train.jsonl"]),
        ([{"config_name": "a", "data_files": "data/*"}], "a", ["data/train-0.parquet", "data/test-0.parquet"]),
        ([{"config_name": "a", "data_files": [{"split": "train", "path": ["data/train-*"]}]}], "", ["data/train-0.parquet"]),
        ([{"config_name": "b", "data_files": "b/*"}, {"config_name": "a", "default": True, "data_files": "data/tr*"}], "",
         ["data/train-0.parquet"]),
    ],
)  # fmt: skip
def test_the_card_says_which_files_are_for_training(configs, config, expected):
    paths = ["README.md", "data/train-0.parquet", "data/test-0.parquet", "b/train.jsonl"]
    assert hub.training_files(paths, configs, config) == expected


# ── killed while tokenising ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("killed_at", [1, 7, 23, 40, 59])
def test_tokenising_goes_on_where_it_was_killed(home, tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(tokenizing, "SAVE_CHARACTERS", 500)
    monkeypatch.setattr(tokenizing, "CHUNKS_PER_CALL", 4)
    monkeypatch.setattr(tokenizing, "CHUNK_CHARACTERS", 50)
    random = np.random.default_rng(0)
    texts = ["".join(f"line {i}\n" for i in range(random.integers(1, 60))) + f"{n}" for n in range(60)]
    (tmp_path / "d.jsonl").write_bytes(lines(*texts))
    source = open_local(tmp_path / "d.jsonl")

    def deadly(skip):
        for i, document in enumerate(source.documents()):
            if i == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    if not (child := os.fork()):
        try:
            tokenize_source(replace(source, documents=deadly), ByteTokenizer())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    read = []

    def documents(skip):
        read.append(skip)
        return source.documents(skip)

    found = tokenize_source(replace(source, documents=documents), ByteTokenizer())
    assert read[0] >= killed_at - 12  # all but the last pieces was noted
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "other"))
    undisturbed = tokenize_source(source, ByteTokenizer())
    assert found.manifest == undisturbed.manifest
    for file in ("train.bin", "val.bin", "test.bin"):
        assert (found.folder / file).read_bytes() == (undisturbed.folder / file).read_bytes()
    assert [p.name for p in (home / "data").iterdir()] == [found.folder.name]


# ── mixtures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def mixed(lengths=(5000, 900, 3000), weights=(0.7, 0.2, 0.1), context=8, rows=16, seed=3, rank=0, world=1):
    tokens = np.concatenate([np.arange(n) + 10_000 * i for i, n in enumerate(lengths)]).astype("u2")
    mixture = [{"tokens": n, "weight": w} for n, w in zip(lengths, weights)]
    return MixedBatches(tokens, mixture, context, rows, seed, rank, world)


def test_rows_of_a_mixture_are_exactly_by_weight():
    batches = mixed(rows=20)
    part = np.concatenate([batches.at(step)[0][:, 0].numpy() // 10_000 for step in range(2 * BLOCK // 20)])
    for block in part.reshape(2, BLOCK):
        assert np.bincount(block).tolist() == [700, 200, 100]
    assert (part[:BLOCK] != part[BLOCK:]).any()


def test_each_source_of_a_mixture_keeps_its_own_epochs():
    batches = mixed()
    starts = np.concatenate([batches.positions(step) for step in range(500)])
    for p, length in enumerate((5000, 900, 3000)):
        own = starts[(starts >= batches.offsets[p]) & (starts < batches.offsets[p] + length)] - batches.offsets[p]
        alone = Batches(batches.tokens[batches.offsets[p] :][:length], 8, 1, 3)
        assert (own == alone.starts(np.arange(len(own)))).all()
    inputs, targets = batches.at(7)
    assert (inputs[:, 1:] == targets[:, :-1]).all() and (targets - inputs == 1).all()  # no row crosses a border


def test_a_mixture_does_not_depend_on_the_number_of_processes_or_on_the_past():
    whole = mixed()
    steps = [whole.at(step)[0] for step in range(100)]
    for world in (2, 4):
        ranks = [mixed(rank=rank, world=world) for rank in range(world)]
        for step in (0, 99, 40):  # any step at once
            rows = [r.at(step)[0] for r in ranks]
            assert all((rows[rank] == steps[step][rank::world]).all() for rank in range(world))


def test_quotas_are_the_nearest_whole_rows():
    for weights in ((1, 1, 1), (0.7, 0.3), (5, 1e-2), (3, 1, 4, 1, 5, 9, 2, 6)):
        rows = rows_per_block(weights)
        assert rows.sum() == BLOCK and (abs(rows - np.array(weights) / sum(weights) * BLOCK) < 1).all()


def test_a_mixture_is_a_source_like_any_other(tmp_path):
    write(tmp_path / "notes", count=2)
    (tmp_path / "book.txt").write_text("".join(f"Paragraph {i}.\n\n" for i in range(200)))
    spec = f"{tmp_path}/notes=3,{tmp_path}/book.txt=1"
    source = open_source(spec)
    parts = [open_local(tmp_path / name) for name in ("notes", "book.txt")]
    assert list(source.documents()) == [d for part in parts for d in part.documents()]
    assert source.fingerprint != open_source(spec.replace("=3", "=2")).fingerprint
    assert "75.0% local text 'notes'" in source.attribution and source.license == "unknown (local files)"
    found, alone = tokenize_source(source, ByteTokenizer()), [tokenize_source(part, ByteTokenizer()) for part in parts]
    for split in ("train", "val", "test"):
        assert found.tokens(split).tolist() == [t for part in alone for t in part.tokens(split).tolist()]
        assert found.bytes(split) == sum(part.bytes(split) for part in alone)
    assert found.batches(16, 4, 0).quotas.tolist() == [750, 250]


def test_pretraining_reads_a_mixture_and_its_card_says_so(tmp_path, nanoghost, home):
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
        ("{a}=1,nowhere=1", "no data called 'nowhere'"),
    ],
)
def test_mistakes_in_mixtures_are_named(tmp_path, spec, message):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("text " * 100)
    with pytest.raises(UserError, match=message):
        open_source(spec.format(a=tmp_path / "a", b=tmp_path / "b"))
