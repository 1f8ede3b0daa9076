"""The learning rate of a step, as a pure function of its number: a resumed run needs no state for it."""

from __future__ import annotations

import math


def lr_factor(
    step: int, total: int, schedule: str = "cosine", warmup: int = 0, *, fall_steps: int = 1, fall: float = 0.1
) -> float:
    """Return what the learning rate of a step is multiplied with.

    Warm-up: `(step + 1) / (warmup + 1)` while `step < warmup`. Then, with `t = (step - warmup) / (total - warmup)`:
    `"cosine"` is `(1 + cos(pi t)) / 2`, `"linear"` is `1 - t`, both 1 at `warmup` and 0 at `total`; `"step"` is
    `fall ** floor(step / fall_steps)`; `"constant"` is 1.

    Args:
        step: Number of optimizer steps before this one.
        total: Steps of the whole run.
        schedule: `"cosine"`, `"linear"`, `"step"` or `"constant"`.
        warmup: Steps of the linear rise.
        fall_steps: Steps between two falls of `"step"`, counted from the start of the run.
        fall: What each of them multiplies with.

    Example:
        >>> [round(lr_factor(step, 4), 3) for step in range(5)]
        [1.0, 0.854, 0.5, 0.146, 0.0]
        >>> [lr_factor(step, 4, "step", fall_steps=2, fall=0.5) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(fall ** (step // max(1, fall_steps)))
    part = min(1.0, (step - warmup) / max(1, total - warmup))  # a stream may give more batches than its length says
    return 1.0 - part if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * part))
