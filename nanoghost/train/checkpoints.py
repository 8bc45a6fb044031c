"""Checkpoints: what a stage needs to go on, written beside the training and never half.

    state/00000120/rank-0.safetensors ...   each rank's shard of the optimizer's state
    state/00000120/manifest.json            step, notes, and size and SHA-256 of each file; written when all of them are on disk
    state/latest                            names the checkpoint to resume from; moves when the manifest is on disk

A copy of the state is taken at once, everything else happens in a thread. A folder without a manifest is none; files that
differ from their manifest are not read. Rows (matrices of Muon's buckets, elements of AdamW's) are numbered over all ranks,
so that another number of ranks can share them out anew.
"""

import hashlib
import json
import math
import os
import shutil
import threading
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from nanoghost import distributed
from nanoghost.errors import UserError
from nanoghost.home import write_atomic, write_json

FORMAT = 2
FAILURES = 3  # saves in a row that may fail before the run is stopped


class Checkpoints:
    def __init__(self, folder: Path, keep_last: int = 1, keep_every: int = 0, say=print):
        """`folder`: state/ of a model. Of its checkpoints the best, the last ones and every so many-th step stay."""
        self.folder, self.keep_last, self.keep_every, self.say = folder, max(1, keep_last), keep_every, say
        self.rank, self.world = distributed.ranks()
        self.thread: threading.Thread | None = None
        self.error = ""
        self.failures = 0
        self.whole = -1  # the step of the last one that is known to be good

    # -- write --

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, step: int, state: dict[str, torch.Tensor], notes: dict, score: float = 0.0) -> None:
        """Begin a checkpoint; `settle` ends it. `score`: the lower, the better is the model there. All ranks call it."""
        if step == self.whole:  # there is nothing to gain, and a good one to lose
            return
        copy = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in state.items()}
        self.step, self.manifest = step, {"format": FORMAT, "step": step, "score": score, "notes": notes, "files": {}}
        self.start(self.write_shard, copy)

    def settle(self) -> str:
        """End what was begun, all ranks together, waiting for what is not written yet; returns what went wrong, or nothing."""
        if not self.thread:
            return ""
        self.thread.join()
        everyone = distributed.all_gather_object((self.error, self.manifest["files"]))
        self.manifest["files"] = {name: entry for _, files in everyone for name, entry in files.items()}
        if self.world > 1:
            if self.rank == 0 and not any(error for error, _ in everyone):
                self.start(self.commit)
                self.thread.join()
            everyone += distributed.all_gather_object((self.error, {}))
        error = next((error for error, _ in everyone if error), "")
        self.thread, self.error = None, ""
        if not error:
            self.failures, self.whole = 0, self.step
            return ""
        self.failures += 1
        latest = self.folder / "latest"
        stands = f"that of step {int(latest.read_text())} stands" if latest.exists() else "there is none yet"
        error = f"the checkpoint of step {self.step} could not be written ({error}); {stands}"
        if self.failures == FAILURES:
            raise UserError(f"{error}; it was the {self.failures}rd in a row")
        self.say(error)
        return error

    def start(self, work, *arguments) -> None:
        def run():
            try:
                work(*arguments)
            except OSError as e:
                self.error = e.strerror or str(e)

        self.thread = threading.Thread(target=run, name="checkpoint")
        self.thread.start()

    def write_shard(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self.path(self.step) / f"rank-{self.rank}.safetensors"
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (path.parent / "manifest.json").unlink(missing_ok=True)  # of a damaged one of the same step
        free = shutil.disk_usage(path.parent).free
        if free < size * 1.05:
            raise OSError(
                28, f"No space left on device: it takes {size / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free"
            )
        content = safetensors.torch.save(tensors)
        write_atomic(path, content)
        self.manifest["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if self.world == 1:
            self.commit()

    def commit(self) -> None:
        """All shards are on disk: the manifest, then `latest`, then what need not be kept any longer goes."""
        folder = self.path(self.step)
        write_json(folder / "manifest.json", self.manifest)
        for path in (folder, self.folder):  # names are on disk when their folder is
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        write_atomic(self.folder / "latest", f"{folder.name}\n")
        self.prune()

    def prune(self) -> None:
        """Remove all but the last few, the best and every so many-th; what is ahead of the run was left behind by it."""
        scores = {step: self.manifest_of(step).get("score", math.inf) for step in self.steps() if step <= self.step}
        kept = sorted(scores)[-self.keep_last :]
        kept += [min(scores, key=lambda step: (scores[step], -step))]
        kept += [step for step in scores if self.keep_every and step % self.keep_every == 0]
        for path in self.folder.iterdir():
            if path.is_dir() and int(path.name) not in kept:
                (path / "manifest.json").unlink(missing_ok=True)  # first: from now on it is none
                shutil.rmtree(path)
            elif path.suffix == ".tmp":
                path.unlink()

    # -- read --

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08}"

    def steps(self) -> list[int]:
        """Of all checkpoints that have a manifest."""
        return sorted(int(path.parent.name) for path in self.folder.glob("*/manifest.json"))

    def manifest_of(self, step: int) -> dict:
        """Empty if it cannot be read."""
        try:
            return json.loads((self.path(step) / "manifest.json").read_text())
        except ValueError:
            return {}

    def load(self, optimizer) -> tuple[int, dict]:
        """(step, notes) of the last good checkpoint, with the optimizer as it was then; (0, {}) if there is none yet.

        Raises UserError where there are checkpoints but none that can be read.
        """
        if next(self.folder.glob("checkpoint-*.safetensors"), None):
            raise UserError(
                f"{self.folder} holds a checkpoint of an older nanoghost, which this one cannot read: go on with that one,"
                " or start anew with --force"
            )
        latest = self.folder / "latest"
        first = latest.read_text().strip() if latest.exists() else ""
        steps = sorted(self.steps(), key=lambda step: (self.path(step).name == first, step), reverse=True)
        reasons = []
        for step in steps:
            reason = next(filter(None, distributed.all_gather_object(self.damage(step))), "")
            if not reason:
                if reasons:
                    self.say(f"{'; '.join(reasons)}: going on from step {step}")
                manifest = self.manifest_of(step)
                optimizer.load_state(self.read(step, manifest, optimizer))
                self.whole = step
                return step, manifest["notes"]
            reasons.append(f"the checkpoint of step {step} cannot be used ({reason})")
        if reasons:
            raise UserError(f"{'; '.join(reasons)}, and there is no other: start anew with --force")
        return 0, {}

    def damage(self, step: int) -> str:
        """What is wrong with a checkpoint, or nothing; each rank looks at its share of the files."""
        manifest = self.manifest_of(step)
        if not manifest:
            return "manifest.json is no JSON"
        if manifest.get("format") != FORMAT:
            return f"it has format {manifest.get('format')}, not {FORMAT}"
        for name in sorted(manifest["files"])[self.rank :: self.world]:
            path = self.path(step) / name
            if not path.exists():
                return f"{name} is missing"
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != manifest["files"][name]["sha256"]:
                    return f"{name} differs from its checksum"
        return ""

    def read(self, step: int, manifest: dict, optimizer) -> dict[str, torch.Tensor]:
        """The rows that belong to this rank today, out of the shards of those ranks that wrote it."""
        names = [f"rank-{r}.safetensors" for r in range(len(manifest["files"]))]
        files = [safe_open(self.path(step) / name, "pt") for name in names]
        if wrong := set(files[0].keys()) ^ set(optimizer.state()):
            raise UserError(f"the checkpoint of step {step} is of another model: it differs in {min(wrong)}")
        found = {}
        for name, own in optimizer.state().items():
            if not own.dim():
                found[name] = files[0].get_tensor(name).clone()  # not a view of the file
                continue
            rows, first = torch.zeros(own.shape, dtype=own.dtype), optimizer.buckets[name.rpartition("/")[0]].first_row
            start = 0  # of a shard
            for file in files:
                shard = file.get_slice(name)
                end = start + shard.get_shape()[0]
                low, high = max(start, first), min(end, first + len(own))
                if low < high:
                    rows[low - first : high - first] = shard[low - start : high - start]
                start = end
            found[name] = rows
        return found
