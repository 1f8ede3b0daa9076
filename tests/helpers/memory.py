"""How much memory tensors take: those that are there, and those that come into being while something runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def in_tensors(run: Callable[[], Any]) -> tuple[int, int]:
    """Most bytes in tensors that came into being while it ran, and those that are left with its result alive."""
    gc.collect()
    gc.disable()  # what only the collector frees would make the peak depend on when it runs
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
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
