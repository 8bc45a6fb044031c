"""`nanoghost lab baselines` with toy programs instead of nanochat and nanoGPT: unigram models of characters."""

import json
import math
from collections import Counter

import pytest

from nanoghost.data.registry import open_data_source
from nanoghost.lab import baselines
from nanoghost.train import pretrain

COUNTS = """
import math, sys
from collections import Counter
def bits(train, test):
    counts = Counter(train)
    return -sum(math.log2(counts[c] / len(train)) for c in test) / len(test)
"""
NANOGPT = (
    COUNTS
    + """
import numpy as np, pickle
train, test = (np.fromfile(f"data/nanoghost/{n}.bin", dtype=np.uint16) for n in ("train", "val"))
meta = pickle.load(open("data/nanoghost/meta.pkl", "rb"))
assert set(train) | set(test) <= set(meta["itos"]) and len(meta["stoi"]) == meta["vocab_size"]
nats = bits(train.tolist(), test.tolist()) * math.log(2)
steps = next(int(w.split("=")[1]) for w in sys.argv if w.startswith("--max_iters"))
for i in range(steps + 1):
    if i in (0, steps):
        print(f"step {i}: train loss 9.0, val loss {nats + 1 - i / steps:.8f}")
    print(f"iter {i}: loss 1.0, time {9000 if i in (0, steps) else 10}.00ms, mfu 1%")
"""
)
NANOCHAT = (
    COUNTS
    + """
import os, pyarrow.parquet as pq
folder = os.environ["NANOCHAT_BASE_DIR"]
assert os.path.exists(f"{folder}/tokenizer/token_bytes.pt")
tables = (pq.read_table(f"{folder}/base_data_climbmix/shard_0000{i}.parquet") for i in (0, 1))
train, test = ("".join(table["text"].to_pylist()) for table in tables)
print("Step 00000 | Validation bpb: 9.0")
print("step 00000/00002 (0.00%) | loss: 9.0 | lrm: 1.00 | dt: 1500.00ms | tok/sec: 1")
print("step 00001/00002 (50.00%) | loss: 8.0 | lrm: 1.00 | dt: 500.00ms | tok/sec: 1")
print(f"Step 00002 | Validation bpb: {bits(train, test):.8f}")
"""
)
TOKENIZER = """
import os
os.makedirs(os.environ["NANOCHAT_BASE_DIR"] + "/tokenizer")
open(os.environ["NANOCHAT_BASE_DIR"] + "/tokenizer/token_bytes.pt", "w").close()
"""


def bits(train: str, test: str) -> float:
    """Bits per character of the test text, as the toy programs compute them."""
    counts = Counter(train)
    return -sum(math.log2(counts[c] / len(train)) for c in test) / len(test)


@pytest.fixture
def clones(tmp_path):
    """Folders with toy programs instead of nanoGPT and nanochat."""
    programs = {
        "gpt/train.py": NANOGPT,
        "chat/scripts/tok_train.py": TOKENIZER,
        "chat/scripts/base_train.py": NANOCHAT,
    }
    for name, program in programs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(program)
    (tmp_path / "gpt" / "data").mkdir()
    return tmp_path


def test_baselines_get_the_whole_text_and_their_logs_are_parsed(nanoghost, toy_file, clones, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "example_texts", list)
    arguments = [
        *("lab", "baselines", "--data", toy_file, "--minutes", "0.05"),
        *("--nanogpt", clones / "gpt", "--nanogpt-steps", 5),
        *("--nanochat", clones / "chat", "--nanochat-steps", 2),
        *("--out", tmp_path / "baselines.svg", "--json"),
    ]
    code, out, err = nanoghost(*arguments)
    assert code == 0, err
    points = json.loads(out)["points"]
    documents = list(open_data_source(str(toy_file)).documents())
    train, test = ("".join(d.text for d in documents if d.split == split) for split in ("train", "test"))
    [[seconds, bpb]] = points["nanogpt"]
    assert math.isclose(bpb, bits(train, test), abs_tol=1e-3)
    assert math.isclose(seconds, 0.24, abs_tol=0.1), "four steps of 10 ms, and two that also evaluated"
    assert points["nanochat"] == [[2.0, round(bits(train, test), 8)]]
    [[seconds, bpb]] = points["nanoghost"]
    assert 0 < seconds < 60
    assert 0 < bpb < 8
    assert (tmp_path / "baselines.svg").read_text().count("<circle") == 3
    assert nanoghost(*arguments)[1] == out, "a finished run is not repeated"


def test_a_folder_that_is_not_a_clone_is_an_error(nanoghost, toy_file, tmp_path):
    code, _, err = nanoghost("lab", "baselines", "--data", toy_file, "--nanogpt", tmp_path)
    assert code == 2
    assert "is not a clone" in err


def test_chunks_are_short_and_together_the_text(toy_file):
    source = open_data_source(str(toy_file))
    chunks = baselines.split_into_chunks(source, "train")
    assert "".join(chunks) == "".join(d.text for d in source.documents() if d.split == "train")
    assert max(map(len, chunks)) <= baselines.CHUNK_CHARACTERS
