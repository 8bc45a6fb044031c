"""Time in a training run: seconds of work, throughput, and how many steps fit into the given minutes."""

import time
from collections import deque
from collections.abc import Callable

from nanoghost import distributed


class Clock:
    """Seconds of work over all resumes of a run, and when the next checkpoint is due."""

    def __init__(self, seconds_before: float = 0.0, checkpoint_seconds: float = 0.0):
        """`seconds_before`: work done before this process started."""
        now = time.perf_counter()
        self.start = now
        self.seconds_before = seconds_before
        self.checkpoint_seconds = checkpoint_seconds
        self.last_checkpoint = now
        self.steps_done = 0  # by this process

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.start

    def count_step(self) -> None:
        self.steps_done += 1

    def seconds_left(self, steps_to_go: int) -> float:
        """Estimate from the steps that this process has counted."""
        return (time.perf_counter() - self.start) / max(1, self.steps_done) * steps_to_go

    def checkpoint_due(self) -> bool:
        """True once every `checkpoint_seconds`; the call that returns True restarts the interval."""
        now = time.perf_counter()
        if now - self.last_checkpoint < self.checkpoint_seconds:
            return False
        self.last_checkpoint = now
        return True


class Throughput:
    """Tokens per second over the last steps."""

    def __init__(self, window: int = 20):
        """`window`: number of steps to average over."""
        self.history = deque([(time.perf_counter(), 0)], maxlen=window + 1)  # (time, tokens until then)

    def add(self, tokens: int) -> None:
        """Count the tokens of a step that has just ended."""
        self.history.append((time.perf_counter(), self.history[-1][1] + tokens))

    @property
    def tokens_per_second(self) -> float:
        first_time, first_tokens = self.history[0]
        last_time, last_tokens = self.history[-1]
        return round((last_tokens - first_tokens) / max(last_time - first_time, 1e-9), 1)


def steps_that_fit(seconds: float, one_step: Callable[[int], None], trials: int = 12) -> int:
    """Step-time calibration: how many steps fit into `seconds`, minus the time that the calibration itself takes.

    Runs `one_step(i)` `trials` times; it must train a throwaway copy of the model. The first third is warm-up
    (allocation, compilation). Of the others the second fastest counts, so that other load on the machine during the
    calibration does not shorten the run. All processes get the same number.
    """
    times = []
    for i in range(trials):
        start = time.perf_counter()
        one_step(i)
        times.append(time.perf_counter() - start)
    step_seconds = sorted(times[trials // 3 :])[1] * 1.05  # 5% for logging and checkpoints
    steps = (seconds - sum(times)) / step_seconds
    return max(1, round(distributed.all_reduce_mean(steps)))
