"""Checkpoints for an exact resume, written in the background.

    state/00000120/rank-0.safetensors ...   one shard of the optimizer's state for each rank
    state/00000120/manifest.json            step, saved values, size and SHA-256 of each file; written last
    state/latest                            name of the checkpoint to resume from; written after the manifest

Saving copies the state; a thread writes the copy. A folder without a manifest is not a checkpoint, and files that
differ from their manifest are not read. The rows of a tensor (whole matrices for Muon, elements for AdamW) are
numbered over all ranks, so that a run can be resumed with another number of ranks.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from nanoghost import distributed
from nanoghost.errors import UserError
from nanoghost.home import write_atomic, write_json

CHECKPOINT_FORMAT = 3
MAX_FAILURES = 3  # consecutive failed saves that end the run


class Checkpoints:
    """The checkpoints of a run: the best one, the last `keep_last`, and one every `keep_every` steps (0: none)."""

    def __init__(self, folder: Path, keep_last: int = 1, keep_every: int = 0, log: Callable[[str], None] = print):
        """`folder`: state/ of a model."""
        self.folder, self.keep_last, self.keep_every, self.log = folder, max(1, keep_last), keep_every, log
        self.rank, self.world_size = distributed.rank_and_world_size()
        self.thread: threading.Thread | None = None
        self.error = ""  # of the thread
        self.step = -1  # of the checkpoint that is being written
        self.manifest: dict = {}
        self.failures = 0
        self.last_complete_step = -1  # of the last checkpoint that was written or loaded

    # -- write --

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self.thread is not None and self.thread.is_alive()

    def start_save(self, step: int, state: dict[str, torch.Tensor], values: dict, score: float = 0.0) -> None:
        """Start writing a checkpoint; all ranks call it, and `finish_save` later.

        `values`: counters of the training loop, which `load` returns. `score`: the lower, the better the model.
        """
        if step == self.last_complete_step:  # writing it again would only risk a complete checkpoint
            return
        copy = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
        self.step = step
        self.manifest = {"format": CHECKPOINT_FORMAT, "step": step, "score": score, "values": values, "files": {}}
        self.start_thread(self.write_shard, copy)

    def finish_save(self) -> str:
        """Wait until the checkpoint of all ranks is complete, if one was started. Returns an error message, or ""."""
        if not self.thread:
            return ""
        self.thread.join()
        results = distributed.all_gather_object((self.error, self.manifest["files"]))
        for _, files in results:
            self.manifest["files"] |= files
        errors = [error for error, _ in results if error]
        if self.world_size > 1:
            if self.rank == 0 and not errors:
                self.start_thread(self.commit)
                self.thread.join()
            errors += [error for error in distributed.all_gather_object(self.error) if error]
        self.thread, self.error = None, ""
        if not errors:
            self.failures, self.last_complete_step = 0, self.step
            return ""
        return self.report_failure(errors[0])

    def report_failure(self, error: str) -> str:
        self.failures += 1
        latest = self.folder / "latest"
        available = f"the last one is of step {int(latest.read_text())}" if latest.exists() else "there is none yet"
        message = f"the checkpoint of step {self.step} could not be written ({error}); {available}"
        if self.failures == MAX_FAILURES:
            raise UserError(f"{message}; {MAX_FAILURES} consecutive saves have failed")
        self.log(message)
        return message

    def start_thread(self, work: Callable, *arguments) -> None:
        def run():
            try:
                work(*arguments)
            except OSError as e:
                self.error = e.strerror or str(e)

        self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self.thread.start()

    def write_shard(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self.path(self.step) / f"rank-{self.rank}.safetensors"
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (path.parent / "manifest.json").unlink(missing_ok=True)  # of a damaged checkpoint of the same step
        free = shutil.disk_usage(path.parent).free
        if free < size * 1.05:  # 5% for the header and the manifest
            raise OSError(
                errno.ENOSPC, f"No space left on device: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
            )
        content = safetensors.torch.save(tensors)
        write_atomic(path, content)
        self.manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if self.world_size == 1:
            self.commit()

    def commit(self) -> None:
        """All shards are on disk: write the manifest, then `latest`, then remove old checkpoints."""
        folder = self.path(self.step)
        write_json(folder / "manifest.json", self.manifest)
        for path in (folder, self.folder):  # a file's name is on disk only when its folder is synced
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        write_atomic(self.folder / "latest", f"{folder.name}\n")
        self.prune()

    def prune(self) -> None:
        """Remove old checkpoints, and those of later steps, which are from before a rollback."""
        scores = {step: self.read_manifest(step).get("score", math.inf) for step in self.steps() if step <= self.step}
        best = min(scores, key=lambda step: (scores[step], -step))
        keep = {best, *sorted(scores)[-self.keep_last :]}
        if self.keep_every:
            keep |= {step for step in scores if step % self.keep_every == 0}
        for path in self.folder.iterdir():
            if path.is_dir() and int(path.name) not in keep:
                (path / "manifest.json").unlink(missing_ok=True)  # first: without it the folder is not a checkpoint
                shutil.rmtree(path)
            elif path.suffix == ".tmp":
                path.unlink()

    # -- read --

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints."""
        return sorted(int(path.parent.name) for path in self.folder.glob("*/manifest.json"))

    def read_manifest(self, step: int) -> dict:
        """The manifest of a checkpoint; {} if it is not valid JSON."""
        try:
            return json.loads((self.path(step) / "manifest.json").read_text())
        except ValueError:
            return {}

    def load(self, optimizer) -> tuple[int, dict]:
        """Load the last good checkpoint into the optimizer: (step, its `values`), or (0, {}) if there is none yet.

        Raises UserError if there are checkpoints and none can be read.
        """
        latest = self.folder / "latest"
        latest_name = latest.read_text().strip() if latest.exists() else ""
        candidates = sorted(self.steps(), key=lambda step: (self.path(step).name == latest_name, step), reverse=True)
        problems = []
        for step in candidates:
            damage = [text for text in distributed.all_gather_object(self.find_damage(step)) if text]
            if damage:
                problems.append(f"the checkpoint of step {step} cannot be used ({damage[0]})")
                continue
            if problems:
                self.log(f"{'; '.join(problems)}: resuming from step {step}")
            manifest = self.read_manifest(step)
            optimizer.load_state(self.read_state(step, manifest, optimizer))
            self.last_complete_step = step
            return step, manifest["values"]
        if problems:
            raise UserError(f"{'; '.join(problems)}, and there is no other: start again with --force")
        return 0, {}

    def find_damage(self, step: int) -> str:
        """What is wrong with a checkpoint, or "". Each rank checks a part of the files."""
        manifest = self.read_manifest(step)
        if not manifest:
            return "manifest.json is not valid JSON"
        if manifest.get("format") != CHECKPOINT_FORMAT:
            return f"it has format {manifest.get('format')}, not {CHECKPOINT_FORMAT}"
        for name in sorted(manifest["files"])[self.rank :: self.world_size]:
            path = self.path(step) / name
            if not path.exists():
                return f"{name} is missing"
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != manifest["files"][name]["sha256"]:
                    return f"{name} differs from its checksum"
        return ""

    def read_state(self, step: int, manifest: dict, optimizer) -> dict[str, torch.Tensor]:
        """The optimizer state of this rank, from the shards of the ranks that wrote the checkpoint."""
        shards = [
            safe_open(self.path(step) / f"rank-{rank}.safetensors", "pt") for rank in range(len(manifest["files"]))
        ]
        current = optimizer.state()
        differing = set(shards[0].keys()) ^ set(current)
        if differing:
            raise UserError(f"the checkpoint of step {step} is from another model: it differs in {min(differing)}")
        state = {}
        for name, tensor in current.items():
            if tensor.dim() == 0:
                state[name] = shards[0].get_tensor(name).clone()  # a copy, not a view of the file
            else:
                bucket_name, _, _ = name.rpartition("/")  # the optimizer names its tensors BUCKET/TENSOR
                first_row = optimizer.buckets[bucket_name].first_row
                state[name] = read_rows(shards, name, first_row, tensor)
        return state


def read_rows(shards: list, name: str, first_row: int, like: torch.Tensor) -> torch.Tensor:
    """`len(like)` rows, from `first_row` on, of a tensor that is split over the shards. Missing rows are 0."""
    rows = torch.zeros(like.shape, dtype=like.dtype)
    shard_start = 0
    for shard in shards:
        shard_rows = shard.get_slice(name)
        shard_end = shard_start + shard_rows.get_shape()[0]
        start, end = max(shard_start, first_row), min(shard_end, first_row + len(like))
        if start < end:
            rows[start - first_row : end - first_row] = shard_rows[start - shard_start : end - shard_start]
        shard_start = shard_end
    return rows
