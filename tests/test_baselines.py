"""The race hands its text over whole, and reads from its peers what they say; the peers here are toys that count letters."""

import json
import math
from collections import Counter

from nanoghost.data.registry import open_source
from nanoghost.lab import baselines
from nanoghost.train import pretrain

COUNTS = """
import math, sys
from collections import Counter
def bits(train, test):
    seen = Counter(train)
    return -sum(math.log2(seen[c] / len(train)) for c in test) / len(test)
"""
NANOGPT = (
    COUNTS
    + """
import numpy as np, pickle
train, test = (np.fromfile(f"data/race/{n}.bin", dtype=np.uint16) for n in ("train", "val"))
meta = pickle.load(open("data/race/meta.pkl", "rb"))
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
train, test = ("".join(pq.read_table(f"{folder}/base_data_climbmix/shard_0000{i}.parquet")["text"].to_pylist()) for i in (0, 1))
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
    seen = Counter(train)
    return -sum(math.log2(seen[c] / len(train)) for c in test) / len(test)


def test_peers_get_the_same_text_and_their_words_are_read(nanoghost, toy_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "example_texts", list)
    for name, text in {
        "gpt/train.py": NANOGPT,
        "chat/scripts/tok_train.py": TOKENIZER,
        "chat/scripts/base_train.py": NANOCHAT,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "gpt" / "data").mkdir()
    words = ("lab", "race", "--data", toy_file, "--minutes", "0.05", "--nanogpt", tmp_path / "gpt", "--nanogpt-steps", 5,
             "--nanochat", tmp_path / "chat", "--nanochat-steps", 2, "--out", tmp_path / "race.svg", "--json")  # fmt: skip
    code, out, err = nanoghost(*words)
    assert code == 0, err
    points = json.loads(out)["points"]
    texts = {
        split: "".join(d.text for d in open_source(str(toy_file)).documents() if d.split == split)
        for split in ("train", "test")
    }
    [[seconds, bpb]] = points["nanogpt"]
    assert math.isclose(bpb, bits(**texts), abs_tol=1e-3)
    assert math.isclose(seconds, 0.24, abs_tol=0.1), "four steps of 10 ms, and two that also evaluated"
    assert points["nanochat"] == [[2.0, round(bits(**texts), 8)]]
    [[seconds, bpb]] = points["nanoghost"]
    assert 0 < seconds < 60 and 0 < bpb < 8
    assert (tmp_path / "race.svg").read_text().count("<circle") == 3
    assert nanoghost(*words)[1] == out, "what was run is not run again"
    code, _, err = nanoghost(*words[:-1], "--nanogpt", tmp_path)
    assert code == 2 and "no clone" in err


def test_pieces_are_the_text(toy_file):
    source = open_source(str(toy_file))
    found = baselines.pieces(source, "train")
    assert "".join(found) == "".join(d.text for d in source.documents() if d.split == "train")
    assert max(map(len, found)) <= baselines.PIECE
