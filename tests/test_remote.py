"""Remote text: the same documents whatever fails, and a cache with a limit."""

import json
import os
import socket
import sys
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from nanoghost.data import download_cache, hub, retry
from nanoghost.data.download_cache import DownloadCache, RemoteFile
from nanoghost.data.local import open_local
from nanoghost.data.registry import open_data_source
from nanoghost.errors import UserError


class Flaky(MemoryFileSystem):
    """Files in memory. The requests with the numbers in `failures` (counted from 1) fail."""

    protocol = "flaky"
    cachable = False
    requests, failures = [], ()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.requests.append((path, start, end))
        if len(Flaky.requests) in Flaky.failures:
            raise TimeoutError("connection lost")
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture(autouse=True)
def remote_files(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.0)
    Flaky.requests, Flaky.failures = [], ()
    MemoryFileSystem.store.clear()
    yield MemoryFileSystem()
    MemoryFileSystem.store.clear()


def json_lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder, count: int = 3, rows: int = 12) -> None:
    folder.mkdir()
    for i in range(count):
        (folder / f"part-{i}.jsonl").write_bytes(
            json_lines(*(f"document {row} of part {i}" for row in range(rows)), "")
        )


def upload(fs, folder, to: str) -> None:
    for file in folder.iterdir():
        fs.pipe_file(f"{to}/{file.name}", file.read_bytes())


# ── URLs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_remote_files_give_the_same_documents_as_local_files(tmp_path, remote_files):
    import pyarrow as pa
    from pyarrow import parquet

    write(tmp_path / "text")
    parquet.write_table(pa.table({"text": ["seven", "eight"]}), tmp_path / "text" / "z.parquet")
    (tmp_path / "text" / "notes.md").write_text("# nine")
    (tmp_path / "text" / ".hidden.txt").write_text("no")
    local = list(open_local(tmp_path / "text").documents())
    upload(remote_files, tmp_path / "text", "/bucket/text")
    for url in ("memory://bucket/text", "flaky://bucket/text", f"file://{tmp_path}/text"):
        assert list(open_data_source(url).documents()) == local, url
    assert open_data_source("memory://bucket/text").fingerprint == open_data_source("flaky://bucket/text").fingerprint
    matching = open_data_source("memory://bucket/text/part-*.jsonl")
    assert len(list(matching.documents())) == 36
    assert matching.name == "part"
    assert matching.license.startswith("unknown")
    assert "".join(d.text for d in open_data_source("memory://bucket/text/notes.md").documents()) == "# nine"
    remote_files.pipe_file("/bucket/text/part-0.jsonl", json_lines("other"))
    assert (
        open_data_source("memory://bucket/text").fingerprint
        != open_data_source("flaky://bucket/text/part-*").fingerprint
    )


def test_failed_requests_are_repeated_and_lose_nothing(tmp_path, remote_files, monkeypatch):
    monkeypatch.setattr(download_cache, "REQUEST_BYTES", 100)
    write(tmp_path / "text")
    upload(remote_files, tmp_path / "text", "/bucket/text")
    Flaky.failures = {1, 2, 3, 4, 5, 7, 9, 10, 15}
    assert list(open_data_source("flaky://bucket/text").documents()) == list(open_local(tmp_path / "text").documents())
    successful = [request for i, request in enumerate(Flaky.requests, 1) if i not in Flaky.failures]
    assert len(successful) == len(set(successful))  # nothing was fetched twice
    Flaky.failures = range(10**6)
    remote_files.pipe_file("/bucket/text/part-0.jsonl", json_lines("new"))
    with pytest.raises(UserError, match="cannot read /bucket/text/part-0.jsonl, tried 6 times: connection lost"):
        list(open_data_source("flaky://bucket/text").documents())


def test_a_killed_download_resumes(tmp_path, remote_files, monkeypatch):
    monkeypatch.setattr(download_cache, "REQUEST_BYTES", 10)
    remote_files.pipe_file("/a.txt", b"0123456789" * 5)

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


def test_the_cache_removes_the_least_recently_used_files(tmp_path, remote_files):
    for name in "abcd":
        remote_files.pipe_file(f"/{name}.txt", name.encode() * 100)
    cache = DownloadCache(tmp_path / "cache", 250)

    def cached_names():
        return "".join(sorted(p.read_text()[0] for p in cache.folder.iterdir()))

    for step, (name, expected) in enumerate(
        [("a", "a"), ("b", "ab"), ("a", "ab"), ("c", "ac"), ("d", "cd"), ("a", "ad")]
    ):
        file = cache.fetch(remote_files, RemoteFile(f"/{name}.txt", 100, "1"))
        os.utime(file, (step, step))  # file systems have coarse clocks
        assert cached_names() == expected
        assert sum(p.stat().st_size for p in cache.folder.iterdir()) <= 250
    with pytest.raises(UserError, match="/big.txt has 251 bytes, and the limit of the cache is 250: set"):
        cache.fetch(remote_files, RemoteFile("/big.txt", 251, "1"))


def test_reading_resumes_at_any_document_without_the_files_before_it(tmp_path, remote_files, home):
    write(tmp_path / "text", count=4, rows=30)
    upload(remote_files, tmp_path / "text", "/bucket/text")
    source = open_data_source("flaky://bucket/text")
    documents = list(source.documents())
    for skip in (0, 1, 19, 20, 29, 30, 31, 60, 75, 119, 120):
        assert list(source.documents(skip)) == documents[skip:], skip
    for file in (home / "data" / "cache").glob("*.jsonl"):
        file.unlink()
    Flaky.requests = []
    assert list(source.documents(95)) == documents[95:]
    # The first file is needed for the splits of its first documents; the second and third are not needed.
    assert [path for path, *_ in Flaky.requests] == ["/bucket/text/part-0.jsonl", "/bucket/text/part-3.jsonl"]


def test_errors_of_urls(remote_files, monkeypatch):
    with pytest.raises(UserError, match="memory://nowhere: no .txt, .md, .jsonl, .parquet file there"):
        open_data_source("memory://nowhere")
    with pytest.raises(UserError, match="nothing://x cannot be read: Protocol not known: nothing"):
        open_data_source("nothing://x")
    remote_files.pipe_file("/bad.jsonl", b"{")
    with pytest.raises(UserError, match="^/bad.jsonl: .*not JSON"):
        list(open_data_source("memory://bad.jsonl").documents())
    monkeypatch.setenv("NANOGHOST_CACHE_GB", "much")
    with pytest.raises(UserError, match="NANOGHOST_CACHE_GB is 'much', not a number"):
        open_data_source("memory://bad.jsonl")


# ── the Hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hub_is_read_up_to_a_limit_and_warns_about_licenses(monkeypatch, capsys, remote_files):
    """A file system in memory and a dataset card of the same form stand in for the Hub."""
    for i in range(3):
        rows = json_lines(*(f"row {i}{j:03}" for j in range(100)))
        remote_files.pipe_file(f"/datasets/owner/name@abc123/sample/train-{i}.jsonl", rows)
    remote_files.pipe_file("/datasets/owner/name@abc123/sample/test-0.jsonl", json_lines("held out"))
    remote_files.pipe_file("/datasets/owner/name@abc123/README.md", b"# a card")
    configs = [{"config_name": "small", "data_files": [{"split": "train", "path": "sample/train-*"}]}]
    info = SimpleNamespace(sha="abc123", card_data={"license": "cc-by-nc-4.0", "configs": configs})
    api = SimpleNamespace(dataset_info=lambda name, timeout: info)
    stand_in = SimpleNamespace(HfApi=lambda: api, HfFileSystem=lambda: remote_files)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    source = hub.open_hub("hub:owner/name:small", max_bytes=1600)
    assert len(list(source.documents())) == 200  # 8 bytes each
    assert [d.text for d in source.documents(150)] == [f"row 1{j:03}" for j in range(50, 100)]
    assert source.name == "owner--name-small"
    assert source.license == "cc-by-nc-4.0"
    assert "at revision abc123" in source.attribution
    assert "may not be used commercially" in capsys.readouterr().err


@pytest.mark.parametrize(
    "configs, config, expected",
    [
        ([], "", ["data/train-0.parquet", "b/train.jsonl"]),
        ([], "b", ["b/train.jsonl"]),
        ([{"config_name": "b", "data_dir": "b"}], "b", ["b/train.jsonl"]),
        ([{"config_name": "a", "data_files": "data/*"}], "a", ["data/train-0.parquet", "data/test-0.parquet"]),
        (
            [{"config_name": "a", "data_files": [{"split": "train", "path": ["data/train-*"]}]}],
            "",
            ["data/train-0.parquet"],
        ),
        (
            [
                {"config_name": "b", "data_files": "b/*"},
                {"config_name": "a", "default": True, "data_files": "data/tr*"},
            ],
            "",
            ["data/train-0.parquet"],
        ),
    ],
)  # fmt: skip
def test_training_files_of_a_dataset_card(configs, config, expected):
    paths = ["README.md", "data/train-0.parquet", "data/test-0.parquet", "b/train.jsonl"]
    assert hub.training_files(paths, configs, config) == expected


def test_a_server_that_does_not_answer_is_not_taken_for_one_without_the_file():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="cannot be read: Cannot connect"):
            open_data_source(f"http://127.0.0.1:{unused.getsockname()[1]}/notes.txt")
        with pytest.raises(UserError, match="^ftp://.* cannot be read: .*refused"):
            open_data_source(f"ftp://127.0.0.1:{unused.getsockname()[1]}/notes.txt")


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/a.txt", "http://[::1/a.txt", "gopher://host/a.txt"])
def test_what_is_not_an_address_is_refused_in_one_line(url):
    with pytest.raises(UserError, match="cannot be read: "):
        open_data_source(url)
