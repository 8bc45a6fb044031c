"""The refinery as steps of datatrove: what is evaluation, what is no prose, what is there twice, what is nearly the same.

    held out, quality -> exact copies -> MinHash signatures -> pairs of a bucket -> clusters -> what is kept

Each stage is a list of steps and a number of tasks, so any of datatrove's executors runs it (`SlurmPipelineExecutor`,
`RayPipelineExecutor`); here it is `Local`. A task that is finished leaves a mark in done/STAGE/completions and is never done
again; one that was killed starts anew, and writes the same.
"""

import json
import multiprocessing
import os
import sys
import threading
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from nanoghost.data.shingles import found_in, shingles, word_hashes
from nanoghost.errors import UserError

SHINGLE = 3
"""Words in a shingle (docs/data.md compares)."""
HASHES = 256
"""At most this many MinHash values to a document."""
BLOCK = 2**12
"""Shingles hashed at once: all of a book's would be a matrix of 100 MB and more."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: list
    tasks: int


def stages(work: Path, shards: int, similarity: float, quality: str) -> list[Stage]:
    """What turns work/input/00000.jsonl ... into work/output and work/output/dropped/REASON."""
    bands, rows = bands_of(similarity)
    exact = ExactDedupConfig(words_of, hash_config=HashConfig(hash_fc="sha1"))
    minhash = MinhashConfig(SHINGLE, bands, rows, hash_config=HashConfig(hash_fc="sha1"))

    def folder(name: str) -> str:
        return str(work / name)

    def dropped(reason: str) -> Lines:
        return Lines(folder(f"output/dropped/{reason}"), texts=False)

    judges = [HeldOut(folder("held_out.npz"), dropped("held out"))]
    if quality == "gopher":
        words = SpacedWords()
        judges += [
            GopherQualityFilter(exclusion_writer=dropped("quality"), language=words),
            # Two of Gopher's six lengths of repeated n-grams: each is a loop over all words.
            GopherRepetitionFilter(
                dup_n_grams=((5, 0.15), (10, 0.10)), exclusion_writer=dropped("repetition"), language=words
            ),
        ]

    def unique(writer=None):
        return [Shards(folder("filtered")), ExactDedupFilter(folder("exact"), exact, writer)]

    signatures = SpellingSignature(folder("signatures"), minhash, SpacedWords())
    return [
        Stage("filter", [Shards(folder("input")), *judges, Lines(folder("filtered")),
                         ExactDedupSignature(folder("hashes"), exact)], shards),
        Stage("exact", [ExactFindDedups(folder("hashes"), folder("exact"), exact)], 1),
        Stage("signatures", [*unique(), signatures], shards),
        Stage("pairs", [MinhashDedupBuckets(folder("signatures"), folder("pairs"), config=minhash)], bands),
        Stage("clusters", [MinhashDedupCluster(folder("pairs"), folder("clusters"), minhash, save_cluster_id=True,
                                               save_cluster_size=True)], 1),
        Stage("write", [*unique(dropped("exact copy")), Similar(folder("clusters"), dropped("similar")),
                        Lines(folder("output"))], shards),
    ]  # fmt: skip


def bands_of(similarity: float) -> tuple[int, int]:
    """(bands, rows) such that documents of that Jaccard similarity are found about two times in three.

    A band of r values agrees with probability s^r; with b = s^-r bands none does with 1/e (Leskovec, Rajaraman and Ullman,
    Mining of Massive Datasets, 3.4). The more rows, the steeper; as many as HASHES allow.
    """
    rows = max(r for r in range(1, HASHES) if r == 1 or r * round(similarity**-r) <= HASHES)
    return round(similarity**-rows), rows


def words_of(document) -> str:
    """What makes two documents exact copies: the same words, however the lines are broken."""
    return " ".join(document.text.split())


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Shards(PipelineStep):
    """Task r reads file r. Datatrove's reader deals out the files that are there, so that one without documents would shift
    the numbers of the rest, and it skips lines that are damaged."""

    name, type = "shards", "reader"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        file = Path(self.folder, f"{rank:05d}.jsonl")
        if file.exists():
            with open(file) as lines:
                for line in lines:
                    row = json.loads(line)
                    yield Document(row["text"], row["name"])


class Lines(DiskWriter):
    """One JSON object a line: name and text of what is kept, name and reason of what is not."""

    name, default_output_filename = "lines", "${rank}.jsonl"

    def __init__(self, folder: str, texts: bool = True):
        super().__init__(folder, compression=None, adapter=with_text if texts else with_reason)

    def _write(self, document: dict, file_handler, filename: str):
        file_handler.write(json.dumps(document) + "\n")


def with_text(writer, document) -> dict:
    cluster = document.metadata.get("minhash_cluster_id", -1)
    return {"name": document.id, "text": document.text} | ({"cluster": cluster} if cluster >= 0 else {})


def with_reason(writer, document) -> dict:
    found = {"detail": document.metadata.get("filter_reason"), "cluster": document.metadata.get("minhash_cluster_id")}
    return {"name": document.id, "bytes": len(document.text.encode())} | {
        k: v for k, v in found.items() if v is not None
    }


class HeldOut(BaseFilter):
    """Drops what shares words with the evaluation: any n of its n-grams, for each n in the index."""

    name = "held out"

    def __init__(self, index: str, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.index, self.known = index, None

    def filter(self, doc):
        if self.known is None:
            with np.load(self.index) as arrays:
                self.known = {key: arrays[key] for key in arrays}
        hashes = word_hashes(doc.text)
        for key, known in self.known.items():  # "plays:13"
            name, _, n = key.rpartition(":")
            if found_in(shingles(hashes, int(n)), known):
                return False, name
        return True


class SpacedWords(WordTokenizer):
    """Words as Gopher counts them: what stands between spaces. (Datatrove's own for English fetches its rules from the net.)"""

    def word_tokenize(self, text):
        return text.split()

    def sent_tokenize(self, text):
        return [text]

    def span_tokenize(self, text):
        return [(0, len(text))]


class SpellingSignature(MinhashDedupSignature):
    """MinHash over shingles that don't depend on spelling, a block at a time."""

    def get_shingles(self, text):
        return shingles(word_hashes(text), SHINGLE)[:, None]

    def get_signature(self, shingles):
        blocks = [
            super(SpellingSignature, self).get_signature(shingles[i : i + BLOCK])
            for i in range(0, len(shingles), BLOCK)
        ]
        return np.min(blocks, axis=0).tolist()


class Similar(MinhashDedupFilter):
    """Keeps one document of each cluster, and notes of which."""

    def __init__(self, clusters: str, writer):
        super().__init__(clusters, writer, load_cluster_ids=True)

    def run(self, data, rank: int = 0, world_size: int = 1):
        if self.data_folder.exists(f"{rank:06d}.clusters"):
            self.data_folder.open(f"{rank:06d}.remove", "ab").close()  # without that file the clusters are not noted
        yield from super().run(data, rank, world_size)


# ── here ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Local(LocalPipelineExecutor):
    """Tasks on this machine's cores, in processes that die with this one.

    Datatrove's own leaves its workers behind when it is killed, and they go on writing beside the run that resumes.
    """

    def run(self):
        ranks = self.get_incomplete_ranks()
        Path(self.logging_dir.path).mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        processes = [
            fork.Process(target=self.work, args=(ranks[i :: self.workers],), daemon=True) for i in range(self.workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UserError(
                f"a task failed: {self.logging_dir.path}/said.txt says why; the same command goes on from there"
            )

    def work(self, ranks: list[int]):
        parent = os.getppid()
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        sys.stderr = open(Path(self.logging_dir.path, "said.txt"), "a")  # noqa: SIM115  it ends with this process
        steps = self.pipeline
        for rank in ranks:
            self.pipeline = deepcopy(steps)
            self._run_for_rank(rank)


def end_with(parent: int):
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def run(stages: list[Stage], marks: Path, executor=Local, say=None, **options) -> None:
    """All stages in turn, each after the one before; `executor` is one of datatrove's, `options` are its own."""
    before = None
    for stage in stages:
        if say:
            say(f"  {stage.name}: {stage.tasks} tasks")
        before = executor(
            pipeline=stage.steps, tasks=stage.tasks, logging_dir=str(marks / stage.name), depends=before, **options
        )
        before.run()
