"""The learning rate schedule, by the fraction of the run: runs of a minute and of a day have the same shape."""


def lr_multiplier_at(progress: float, warmup: float = 0.0, cooldown: float = 0.6, floor: float = 0.0) -> float:
    """Factor on the peak learning rate at `progress` in [0, 1]: linear up over `warmup`, constant, and linear down to
    `floor` over the last `cooldown`."""
    up = 1.0 if progress >= warmup else progress / warmup
    down = min(1.0, (1 - progress) / cooldown)
    return up * (floor + (1 - floor) * down)
