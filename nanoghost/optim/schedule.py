"""Schedules as fractions of the run, so that a run of one minute and one of a day have the same shape."""


def learning_rate(progress: float, warmup: float = 0.0, cooldown: float = 0.6, floor: float = 0.0) -> float:
    """Share of the top learning rate at `progress` in [0, 1]: linear up, flat, linear down over the last `cooldown`."""
    up = 1.0 if progress >= warmup else progress / warmup
    down = min(1.0, (1 - progress) / cooldown)
    return up * (floor + (1 - floor) * down)
