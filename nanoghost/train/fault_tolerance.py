"""What keeps a run alive: checkpoints in time, and what is done when the loss is no number, a rank hangs, or memory is short."""

import faulthandler
import math
import os
import threading
import time
from pathlib import Path

import torch

from nanoghost import distributed
from nanoghost.errors import UserError
from nanoghost.home import Stopped
from nanoghost.train.checkpoints import Checkpoints

IN_A_ROW = 3  # batches that may be skipped one after the other, and times that a run may be rolled back


class Keeper:
    """Stands between the gradients and the update of each step (`Run.ready`)."""

    def __init__(self, run, optimizer):
        self.run, self.optimizer = run, optimizer
        asked = run.settings
        self.checkpoints = Checkpoints(run.folder.path / "state", asked.keep_last, asked.keep_every, run.show.say)
        several = distributed.ranks()[1] > 1
        self.watchdog = Watchdog(run.folder.path, asked.hang_minutes * 60, run.show.say) if several else None
        self.scores = []  # of the steps since the last checkpoint
        self.skipped = []  # steps, one after the other

    def ready(self, step: int, loss: float, rows, clock, score: float, notes: dict) -> float | None:
        run, saving = self.run, self.checkpoints
        if self.watchdog:
            self.watchdog.alive()
        first = step == 0 and run.settings.bad_loss == "roll-back"  # so that there is something to go back to
        flags = (run.stopping.requested, clock.due() or first, saving.busy)
        mean, score, stop, due, busy = distributed.all_reduce_mean(loss, score, *flags)
        run.stopping.requested = stop > 0
        if stop or not busy:
            saving.settle()
        if not math.isfinite(mean):
            return self.bad_loss(step, loss, rows)
        self.scores.append(score)
        if (step or first) and (stop or due and not busy):
            saving.save(
                step, self.optimizer.state(), notes | {"seconds": clock.seconds}, sum(self.scores) / len(self.scores)
            )
            self.scores = []
        if stop:
            if error := saving.settle():
                raise UserError(error)
            self.end()
            run.show.close()
            run.show.say(f"{run.folder.name} is saved at step {step} of {run.card['steps']}")
            raise Stopped
        return mean

    def end(self) -> None:
        self.checkpoints.settle()
        if self.watchdog:
            self.watchdog.stop()

    def bad_loss(self, step: int, own: float, rows) -> None:
        """The mean loss over the ranks is no number, and nothing was updated: stop, leave the batch out, or roll back.

        `rows`: what this rank was to learn. All ranks come here together.
        """
        run = self.run
        for bucket in self.optimizer.buckets.values():
            bucket.gradient()  # away with them
        everyone = distributed.all_gather_object((own, rows))
        bad = {rank: its for rank, (loss, its) in enumerate(everyone) if not math.isfinite(loss)}
        value = next(loss for loss, _ in everyone if not math.isfinite(loss))
        where = f"the loss became {value} at step {step}, on rank {', '.join(map(str, bad))} (rows {list(bad.values())[0][:4]} ...)"
        policy = run.settings.bad_loss
        run.event(step, bad_loss=str(value), rows=bad, action=policy)
        if policy == "skip":
            self.skipped = [*self.skipped, step] if self.skipped[-1:] == [step - 1] else [step]
            if len(self.skipped) <= IN_A_ROW:
                run.show.say(f"{where}: this batch is left out")
                return
            raise UserError(
                f"{where}, as at the {IN_A_ROW} before; the last checkpoint stands: try --bad-loss roll-back"
            )
        if policy == "roll-back":
            windows = run.card.get("left_out_batches", [])
            if len(windows) < IN_A_ROW:
                self.checkpoints.settle()
                back, _ = self.checkpoints.load(self.optimizer)
                run.note(left_out_batches=[*windows, [back, step + 1 - back]])
                run.show.say(f"{where}: back to step {back}, and on with the batches that come after this one")
                run.next = back
                return
            raise UserError(f"{where}; it was rolled back {IN_A_ROW} times already, and the last checkpoint stands")
        raise UserError(
            f"{where}; nothing was updated and the last checkpoint stands: go on with --bad-loss skip or roll-back,"
            " or try --force with a smaller --learning-rate"
        )


class Watchdog:
    """Ends this process if a step takes too long, and writes down where each of its threads stood.

    A rank that hangs keeps all others waiting in the next collective, so that every rank's watchdog goes off. A thread of C writes:
    it needs neither the interpreter nor its lock. They leave a little later, or the first to go would end a collective of others that
    have not written yet. Who cannot even leave is ended by torchrun when the others have.
    """

    GRACE = 3.0  # seconds between writing and leaving

    def __init__(self, folder: Path, seconds: float, say):
        self.seconds, self.path = seconds, folder / f"stacks-rank-{distributed.ranks()[0]}.txt"
        if self.path.exists() and self.path.stat().st_size:
            say(f"before, a step took longer than it may; where this process stood then: {self.path}")
        self.file = open(self.path, "a")  # noqa: SIM115 (open as long as it runs)
        self.ended = threading.Event()
        self.alive()
        threading.Thread(target=self.leave, daemon=True).start()

    def alive(self) -> None:
        self.until = time.monotonic() + self.seconds + self.GRACE
        faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def leave(self) -> None:
        while not self.ended.wait(0.2):
            if time.monotonic() > self.until:
                os._exit(1)

    def stop(self) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


class Fitting:
    """How many rows go through the model at once: halved in the first step as long as memory does not suffice for them."""

    def __init__(self, rows: int, say):
        self.rows, self.say, self.known = rows, say, False

    def __call__(self, work, model):
        """`work(rows)`; what is left of a pass that failed is thrown away, so that the result is the same."""
        while not self.known:
            try:
                result = work(self.rows)
                self.known = True
                return result
            except RuntimeError as e:  # torch.OutOfMemoryError is one; on the CPU it has no name of its own
                short = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
                if not short or hasattr(model, "whole"):  # processes that share weights must take as many passes
                    raise
                if self.rows == 1:
                    raise UserError(
                        "memory does not suffice for a single row: choose a smaller --context or --depth"
                    ) from None
            for p in model.parameters():
                p.grad = None
            self.say(
                f"memory does not suffice: {-(-self.rows // 2)} rows go through the model at once instead of {self.rows}"
            )
            self.rows = -(-self.rows // 2)
        return work(self.rows)
