"""Peak memory of one training step of `qat_step.py`, each contender and mode in a process of its own.

There are two numbers. **Tensors** is the largest number of bytes that torch's CPU allocator has given out at once
during a step: weights, gradients, optimizer state, activations, and whatever a contender keeps. The profiler is on
from before the network is made, so it sees every block that is alive; the step that counts is the last of several.
`self_check` checks this method on a network whose bytes are counted by hand. **RSS** is how far the resident memory of
the process grows from before the network is made to the worst moment of the last steps, in a separate pass without the
profiler. It includes scratch memory of libraries and, when compiled, what the compiler has left in the process.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 4
MARK = "qat_memory_step"


def peak_of_last_step(make: Callable[[], Callable[[], Any]], steps: int = STEPS) -> dict[str, int]:
    """Return the bytes in tensors at the start and at the peak of the last of several steps.

    Args:
        make: Builds everything and returns the step.
        steps: How many steps; the first ones create optimizer state and fill caches.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = make()
        for _ in range(steps):
            gc.collect()
            with record_function(MARK):
                step()
        del step
    return _peak(profiler)


def _peak(profiler: profile) -> dict[str, int]:
    """Follow the blocks that a profile saw; a block that was given out before it began is not counted when freed."""
    marks, events = [], []
    for event in _walk(profiler.profiler.kineto_results.experimental_event_tree()):
        if event.name == MARK:
            marks.append((event.start_time_ns, event.end_time_ns))
        elif event.tag == torch._C._profiler._EventType.Allocation and event.extra_fields.device.type == "cpu":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    start, end = max(marks)
    blocks: dict[int, int] = {}
    total = base = peak = 0
    for at, pointer, size in sorted(events, key=lambda event: event[0]):  # stable: equal times stay in their order
        if at > end:
            break
        total -= blocks.pop(pointer, 0)
        if size > 0:
            blocks[pointer] = size
            total += size
        if at < start:
            base = total
        else:
            peak = max(peak, total)
    return {"base_bytes": base, "peak_bytes": max(base, peak)}


def _walk(events: list[Any]) -> Iterator[Any]:
    waiting = list(reversed(events))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))


def self_check() -> None:
    """Measure a step whose bytes are known, and stop if the method does not find them.

    The step has a linear layer without bias, SGD with momentum, and a cache that is made anew. Between steps there are
    weight, its gradient, momentum, input and cache. In a step the old gradient is freed, and output, gradient of the
    output and new gradient are added; neither backward nor the optimizer needs more.

    Raises:
        SystemExit: If a number differs.
    """
    n, k, m, held = 64, 512, 1024, 4096

    def make() -> Callable[[], Any]:
        layer = nn.Linear(k, m, bias=False)
        x, cache = torch.randn(n, k), [torch.empty(held)]
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            cache[0] = torch.empty(held)  # the step frees the old one, given out before it
            y = layer(x)
            y.backward(torch.ones_like(y))
            optimizer.step()

        return step

    found = peak_of_last_step(make)
    between = 4 * (3 * m * k + n * k + held)
    expected = {"base_bytes": between, "peak_bytes": between + 2 * 4 * n * m}
    if found != expected:
        raise SystemExit(f"memory: the profiler finds {found}; counted by hand: {expected}")


def worker(network: str, mode: str, contender: str) -> dict[str, Any]:
    """Measure one contender in this process."""
    import warnings

    from benchmarks.qat import qat_networks
    from benchmarks.qat.qat_contenders import CONTENDERS, Trainee, told

    warnings.simplefilter("ignore")
    try:
        self_check()

        def make() -> Callable[[], Any]:
            torch.manual_seed(0)
            torch._dynamo.reset()
            given = qat_networks.task(network)
            trainee = Trainee(CONTENDERS[contender], given, mode == "compile")
            given.model.to("meta")  # the contender has a copy of its own
            return trainee.step

        grown = rss_growth(make)
        return {**peak_of_last_step(make), "rss_growth_bytes": grown}
    except Exception as error:
        return {"failed": told(error)}


def rss_growth(make: Callable[[], Callable[[], Any]]) -> int | None:
    """Return how far the resident memory grows from before `make` to the worst of the last steps; None if unknown."""
    gc.collect()
    before = _status("VmRSS")
    step = make()
    for _ in range(STEPS - 2):
        step()
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    step()
    step()
    worst = _status("VmHWM")
    return None if before is None or worst is None else worst - before


def _status(key: str) -> int | None:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def run(network: str, mode: str, contender: str, timeout: int) -> dict[str, Any]:
    """Measure one contender in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, __file__, network, mode, contender, str(path)]
        try:
            done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {timeout} s"}
        if path.is_file():
            return json.loads(path.read_text())
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        return {"failed": f"ended with {done.returncode}: {last}"}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is a package there
    Path(sys.argv[4]).write_text(json.dumps(worker(*sys.argv[1:4])))
