"""Fault tolerance of a training run: checkpoints, NaN losses, out-of-memory errors, hanging processes."""

import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nanoghost import distributed
from nanoghost.errors import Stopped, UserError
from nanoghost.optim.fsdp import is_sharded
from nanoghost.train.checkpoints import Checkpoints
from nanoghost.train.clock import Clock
from nanoghost.train.run import Run

MAX_SKIPPED_BATCHES = 3  # consecutive ones, with --bad-loss skip
MAX_ROLLBACKS = 3  # in a run, with --bad-loss roll-back


class StepGuard:
    """Checkpoints and error handling of a training loop. All processes call its methods at the same steps:

    for step in guard.steps():
        batch_index = guard.batch_index(step)
        ...                                   # gradients, and the mean loss over all processes
        if not math.isfinite(loss):
            guard.handle_bad_loss(step, local_loss, examples)
            continue
        guard.save_if_due(step, clock, loss)
        optimizer.step(...)
    """

    def __init__(self, run: Run, optimizer):
        self.run, self.optimizer, self.bad_loss_action = run, optimizer, run.settings.bad_loss
        settings, log = run.settings, run.display.print
        self.checkpoints = Checkpoints(run.folder.path / "state", settings.keep_last, settings.keep_every, log)
        self.watchdog = None
        if distributed.rank_and_world_size()[1] > 1:
            self.watchdog = Watchdog(run.folder.path, settings.hang_minutes * 60, log)
        self.next_step = 0
        self.scores: list[float] = []  # of the steps since the last checkpoint
        self.skipped_steps: list[int] = []  # the last consecutive ones

    def resume(self) -> tuple[int, dict]:
        """Load the last checkpoint into the optimizer: (step to continue at, the values saved with it), or (0, {})."""
        self.next_step, saved = self.checkpoints.load(self.optimizer)
        return self.next_step, saved

    def steps(self) -> Iterator[int]:
        """The steps that are left. After a rollback some steps come again."""
        self.run.stop_flag.wait_for("this step")
        while self.next_step < self.run.card.steps:
            self.next_step += 1
            yield self.next_step - 1
        self.run.stop_flag.wait_for("the model is saved and evaluated")
        self.close()

    def batch_index(self, step: int) -> int:
        """Index of the batch for this step: `step` itself, or a later one if rollbacks have skipped batches."""
        return step + sum(count for first, count in self.run.card.skipped_batches if step >= first)

    def save_if_due(self, step: int, clock: Clock, score: float, **values) -> None:
        """Save a checkpoint of the state before `step` if one is due. Call it between gradients and update.

        If a stop was requested, saves a checkpoint and raises Stopped. `score`: the lower, the better the model.
        `values` are saved with the checkpoint.
        """
        if self.watchdog:
            self.watchdog.reset()
        # The first rollback needs a checkpoint to go back to.
        rollback_target = step == 0 and self.bad_loss_action == "roll-back"
        flags = (self.run.stop_flag.requested, clock.checkpoint_due() or rollback_target, self.checkpoints.is_saving)
        # A flag that is set in one process counts for all of them, so that they decide alike.
        stop, due, is_saving = (mean > 0 for mean in distributed.all_reduce_mean(*flags))
        self.run.stop_flag.requested = stop
        if stop or not is_saving:
            self.checkpoints.finish_save()
        self.scores.append(score)
        if (step > 0 or rollback_target) and (stop or (due and not is_saving)):
            mean_score = sum(self.scores) / len(self.scores)
            self.checkpoints.start_save(step, self.optimizer.state(), values | {"seconds": clock.seconds}, mean_score)
            self.scores = []
        if stop:
            error = self.checkpoints.finish_save()
            if error:
                raise UserError(error)
            self.close()
            self.run.display.close()
            self.run.display.print(f"{self.run.folder.name} is saved at step {step} of {self.run.card.steps}")
            raise Stopped

    def handle_bad_loss(self, step: int, local_loss: float, examples: list) -> None:
        """The mean loss is NaN or inf: discard the gradients and follow --bad-loss (stop, skip, or roll back).

        `examples`: what this process trained on in this step (positions in the text, indices of conversations ...),
        for the log.
        """
        if self.watchdog:
            self.watchdog.reset()
        self.checkpoints.finish_save()
        self.optimizer.zero_grad()
        results = distributed.all_gather_object((local_loss, examples))
        bad_results = {rank: result for rank, result in enumerate(results) if not math.isfinite(result[0])}
        bad_value, first_examples = next(iter(bad_results.values()))
        problem = (
            f"the loss is {bad_value} at step {step}, on rank {', '.join(map(str, bad_results))}"
            f" (training examples {first_examples[:4]} ...)"
        )
        bad_examples = {rank: rank_examples for rank, (_, rank_examples) in bad_results.items()}
        self.run.log_event(step, bad_loss=str(bad_value), examples=bad_examples, action=self.bad_loss_action)
        if self.bad_loss_action == "skip":
            self.skip_batch(step, problem)
        elif self.bad_loss_action == "roll-back":
            self.roll_back(step, problem)
        else:
            raise UserError(
                f"{problem}; the last checkpoint is unaffected: resume with --bad-loss skip or --bad-loss roll-back,"
                " or restart with --force and a smaller --learning-rate"
            )

    def skip_batch(self, step: int, problem: str) -> None:
        consecutive = self.skipped_steps[-1:] == [step - 1]
        self.skipped_steps = [*self.skipped_steps, step] if consecutive else [step]
        if len(self.skipped_steps) > MAX_SKIPPED_BATCHES:
            raise UserError(
                f"{problem}, as at the previous {MAX_SKIPPED_BATCHES} steps; the last checkpoint is unaffected:"
                " try --bad-loss roll-back"
            )
        self.run.display.print(f"{problem}: skipping this batch")

    def roll_back(self, step: int, problem: str) -> None:
        """Return to the last checkpoint and skip the batches from there up to the bad one."""
        skipped = self.run.card.skipped_batches
        if len(skipped) == MAX_ROLLBACKS:
            raise UserError(
                f"{problem}, after {MAX_ROLLBACKS} rollbacks; the last checkpoint is unaffected:"
                " restart with --force and a smaller --learning-rate"
            )
        self.next_step, _ = self.checkpoints.load(self.optimizer)
        self.run.update_card(skipped_batches=[*skipped, [self.next_step, step + 1 - self.next_step]])
        self.run.display.print(f"{problem}: rolling back to step {self.next_step}, skipping the batches up to this one")

    def close(self) -> None:
        self.checkpoints.finish_save()
        if self.watchdog:
            self.watchdog.stop()


class Watchdog:
    """Ends this process if a step takes too long, after it has written the stack of every thread to a file.

    A rank that hangs blocks all others in the next collective operation, so the watchdog of every rank fires.
    `faulthandler` dumps from a C thread, which works without the GIL. The processes exit a little later: the first exit
    aborts the collective of the others, which might not have dumped yet. torchrun ends those that cannot exit.
    """

    EXIT_DELAY = 3.0  # seconds between dump and exit

    def __init__(self, folder: Path, seconds: float, log: Callable[[str], None]):
        self.seconds = seconds
        self.path = folder / f"stacks-rank-{distributed.rank_and_world_size()[0]}.txt"
        if self.path.exists() and self.path.stat().st_size:
            log(f"an earlier run of this model hung; the stacks of this process are in {self.path}")
        self.file = open(self.path, "a")  # noqa: SIM115 (open until `stop`)
        self.stopped = threading.Event()
        self.reset()
        threading.Thread(target=self.exit_when_late, daemon=True).start()

    def reset(self) -> None:
        """Restart the timer: a step has ended."""
        self.deadline = time.monotonic() + self.seconds + self.EXIT_DELAY
        faulthandler.dump_traceback_later(self.seconds, file=self.file)

    def exit_when_late(self) -> None:
        while not self.stopped.wait(0.2):
            if time.monotonic() > self.deadline:
                os._exit(1)

    def stop(self) -> None:
        self.stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if not self.path.stat().st_size:
            self.path.unlink()


class AutoMicroBatch:
    """Gradients of a batch in micro-batches. In the first step, their size is halved until they fit into memory."""

    def __init__(self, accumulate_gradients: Callable[..., float], rows: int, log: Callable[[str], None]):
        """`accumulate_gradients(model, *batch, rows)` adds the gradients of a batch to .grad, `rows` rows at a time."""
        self.accumulate_gradients, self.rows, self.log = accumulate_gradients, rows, log
        self.fits = False  # known after the first step

    def __call__(self, model, *batch) -> float:
        """Compute the gradients of a batch; returns the loss. The result does not depend on the micro-batch size."""
        while True:
            try:
                loss = self.accumulate_gradients(model, *batch, self.rows)
                self.fits = True
                return loss
            except RuntimeError as error:
                # With FSDP all processes must run the same number of passes, so none may reduce its micro-batch alone
                if self.fits or not is_out_of_memory(error) or is_sharded(model):
                    raise
                if self.rows == 1:
                    raise UserError(
                        "out of memory with a single row per forward pass: choose a smaller --context or --depth"
                    ) from None
            for p in model.parameters():
                p.grad = None  # of the micro-batches before the failure
            smaller = math.ceil(self.rows / 2)
            self.log(f"out of memory: reducing the micro-batch from {self.rows} to {smaller} rows")
            self.rows = smaller


def is_out_of_memory(error: RuntimeError) -> bool:
    """Accelerators raise torch.OutOfMemoryError; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
