"""How much memory tensors take: given ones, and those that are created while a function runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def in_tensors(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes of the tensors that `run` creates: at the peak, and while its result is alive."""
    gc.collect()
    gc.disable()  # else the peak would depend on when the collector runs
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
    finally:
        gc.enable()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most, now


def size(tensors: Any) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
