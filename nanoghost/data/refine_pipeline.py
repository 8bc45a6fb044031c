"""The refine pipeline as stages of datatrove: decontamination, quality filters, exact and near deduplication.

    held out, quality -> exact copies -> MinHash signatures -> pairs in a bucket -> clusters -> output

A stage is a list of steps and a number of tasks, so any executor of datatrove runs it (`SlurmPipelineExecutor`,
`RayPipelineExecutor`); the default is `LocalExecutor`. A finished task is recorded in done/STAGE/completions and
never repeated; a killed one starts again and writes the same output.
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

from nanoghost.data.refine_settings import minhash_bands
from nanoghost.data.shingles import contains_any, shingles, word_hashes
from nanoghost.errors import UserError, leave_signals_to_parent

try:
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
except ImportError:
    raise UserError("refining needs an extra: pip install 'nanoghost[refine]'") from None

SHINGLE_WORDS = 3
"""Words in a shingle (docs/results/data.md compares the alternatives)."""
SHINGLES_PER_BLOCK = 2**12
"""Shingles that are hashed at once: the hashes of a whole book would be a matrix of 100 MB and more."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: list
    tasks: int


def build_stages(work: Path, tasks: int, similarity: float, quality: str) -> list[Stage]:
    """Stages that turn work/input/00000.jsonl ... into work/output and work/output/dropped/REASON."""
    bands, rows = minhash_bands(similarity)
    exact = ExactDedupConfig(normalized_words, hash_config=HashConfig(hash_fc="sha1"))
    minhash = MinhashConfig(SHINGLE_WORDS, bands, rows, hash_config=HashConfig(hash_fc="sha1"))

    def folder(name: str) -> str:
        return str(work / name)

    def dropped(reason: str) -> JsonLinesWriter:
        return JsonLinesWriter(folder(f"output/dropped/{reason}"), with_text=False)

    def without_copies(exclusion_writer=None) -> list:
        return [TaskReader(folder("filtered")), ExactDedupFilter(folder("exact"), exact, exclusion_writer)]

    filters = [HeldOutFilter(folder("held_out.npz"), dropped("held out"))]
    if quality == "gopher":
        filters += gopher_filters(dropped("quality"), dropped("repetition"))
    filter_steps = [
        TaskReader(folder("input")),
        *filters,
        JsonLinesWriter(folder("filtered")),
        ExactDedupSignature(folder("hashes"), exact),
    ]
    signature = SpellingInvariantSignature(folder("signatures"), minhash, WhitespaceTokenizer())
    cluster = MinhashDedupCluster(
        folder("pairs"), folder("clusters"), minhash, save_cluster_id=True, save_cluster_size=True
    )
    write_steps = [
        *without_copies(dropped("exact copy")),
        SimilarDocumentFilter(folder("clusters"), dropped("similar")),
        JsonLinesWriter(folder("output")),
    ]
    return [
        Stage("filter", filter_steps, tasks),
        Stage("exact", [ExactFindDedups(folder("hashes"), folder("exact"), exact)], 1),
        Stage("signatures", [*without_copies(), signature], tasks),
        Stage("pairs", [MinhashDedupBuckets(folder("signatures"), folder("pairs"), config=minhash)], bands),
        Stage("clusters", [cluster], 1),
        Stage("write", write_steps, tasks),
    ]


def gopher_filters(quality_writer, repetition_writer) -> list:
    words = WhitespaceTokenizer()
    # Two of Gopher's six lengths of repeated n-grams: each is a loop over all words.
    ngrams = ((5, 0.15), (10, 0.10))
    return [
        GopherQualityFilter(exclusion_writer=quality_writer, language=words),
        GopherRepetitionFilter(dup_n_grams=ngrams, exclusion_writer=repetition_writer, language=words),
    ]


def normalized_words(document) -> str:
    """Documents with the same words are exact copies, however their lines are broken."""
    return " ".join(document.text.split())


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TaskReader(PipelineStep):
    """Task number `rank` reads file number `rank`.

    Datatrove's reader distributes the files that exist, so a task without documents would shift the numbers of the
    others, and it skips damaged lines.
    """

    name, type = "task reader", "reader"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        file = Path(self.folder, f"{rank:05d}.jsonl")
        if file.exists():
            with open(file, "rb") as lines:
                for line in lines:
                    row = json.loads(line)
                    yield Document(row["text"], row["name"])


class JsonLinesWriter(DiskWriter):
    """One JSON object a line: name and text, or for dropped documents name and reason."""

    name, default_output_filename = "JSON lines", "${rank}.jsonl"

    def __init__(self, folder: str, with_text: bool = True):
        super().__init__(folder, compression=None, adapter=output_row if with_text else dropped_row)

    def _write(self, document: dict, file_handler, filename: str):
        file_handler.write(json.dumps(document) + "\n")


def output_row(writer, document) -> dict:
    row = {"name": document.id, "text": document.text}
    cluster = document.metadata.get("minhash_cluster_id", -1)
    if cluster >= 0:
        row["cluster"] = cluster
    return row


def dropped_row(writer, document) -> dict:
    row = {"name": document.id, "bytes": len(document.text.encode())}
    detail = document.metadata.get("filter_reason")
    if detail is not None:
        row["detail"] = detail
    cluster = document.metadata.get("minhash_cluster_id")
    if cluster is not None:
        row["cluster"] = cluster
    return row


class HeldOutFilter(BaseFilter):
    """Drops documents that share an n-gram with the evaluation, for each n of the index (decontamination.py)."""

    name = "held out"

    def __init__(self, index_file: str, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.index_file = index_file
        self.index: dict[str, np.ndarray] | None = None  # loaded in the worker

    def filter(self, doc):
        if self.index is None:
            with np.load(self.index_file) as arrays:
                self.index = {key: arrays[key] for key in arrays}
        hashes = word_hashes(doc.text)
        for key, held_out in self.index.items():  # "plays:13"
            name, _, n = key.rpartition(":")
            if contains_any(shingles(hashes, int(n)), held_out):
                return False, name
        return True


class WhitespaceTokenizer(WordTokenizer):
    """Words as Gopher counts them: separated by white space. (Datatrove's English tokenizer downloads its rules.)"""

    def word_tokenize(self, text):
        return text.split()

    def sent_tokenize(self, text):
        return [text]

    def span_tokenize(self, text):
        return [(0, len(text))]


class SpellingInvariantSignature(MinhashDedupSignature):
    """MinHash over shingles that do not depend on spelling (shingles.py), one block at a time."""

    def get_shingles(self, text):
        return shingles(word_hashes(text), SHINGLE_WORDS)[:, None]

    def get_signature(self, shingles):
        minima = []
        for i in range(0, len(shingles), SHINGLES_PER_BLOCK):
            minima.append(super().get_signature(shingles[i : i + SHINGLES_PER_BLOCK]))
        return np.min(minima, axis=0).tolist()


class SimilarDocumentFilter(MinhashDedupFilter):
    """Keeps one document of each cluster, and stores the id of the cluster with it."""

    def __init__(self, clusters: str, writer):
        super().__init__(clusters, writer, load_cluster_ids=True)

    def run(self, data, rank: int = 0, world_size: int = 1):
        if self.data_folder.exists(f"{rank:06d}.clusters"):
            self.data_folder.open(f"{rank:06d}.remove", "ab").close()  # without this file, clusters are not loaded
        yield from super().run(data, rank, world_size)


# ── executor ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class LocalExecutor(LocalPipelineExecutor):
    """Runs tasks in processes of this machine that end together with this process.

    The workers of datatrove's local executor survive when it is killed, and keep writing while the next run resumes.
    """

    def run(self):
        ranks = self.get_incomplete_ranks()
        Path(self.logging_dir.path).mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        processes = []
        for i in range(self.workers):
            process = fork.Process(target=self.work, args=(ranks[i :: self.workers],), daemon=True)
            process.start()
            processes.append(process)
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UserError(f"a task failed, see {self.logging_dir.path}/errors.log; the same command resumes the run")

    def work(self, ranks: list[int]):
        """Run the tasks `ranks` in a worker process."""
        leave_signals_to_parent()
        parent = os.getppid()
        threading.Thread(target=exit_with_parent, args=(parent,), daemon=True).start()
        sys.stderr = open(Path(self.logging_dir.path, "errors.log"), "a")  # noqa: SIM115  open until the process ends
        pipeline = self.pipeline
        for rank in ranks:
            self.pipeline = deepcopy(pipeline)
            self._run_for_rank(rank)


def exit_with_parent(parent: int):
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def run_stages(stages: list[Stage], done: Path, executor=LocalExecutor, log=None, **options) -> None:
    """Run all stages with an executor class of datatrove and its options. `done` records the completed tasks."""
    previous = None
    for stage in stages:
        if log:
            log(f"  {stage.name}: {stage.tasks} tasks")
        previous = executor(
            pipeline=stage.steps, tasks=stage.tasks, logging_dir=str(done / stage.name), depends=previous, **options
        )
        previous.run()
