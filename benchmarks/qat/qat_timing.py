"""Step times of `qat_step.py`: all contenders of a network and a mode in one process, in turns.

In every round each contender makes the same number of steps, in a random order of contenders. The time of a contender
is compared with that of the float network *in the same round*, so that a machine that is slow for a minute is slow for
both. Before that each contender trains on its one batch: one whose loss does not fall is not timed.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.utils

from benchmarks.qat.qat_contenders import CONTENDERS, Refused, Trainee, told
from benchmarks.qat.qat_networks import Task, task

LEARNING_STEPS = 20
FALL = 0.9
"""The mean loss of the last three steps must be below this part of the first three's."""


def measure(
    network: str, mode: str, contenders: list[str], rounds: int, steps: int, seed: int, tick: Callable[[str], None]
) -> dict[str, Any]:
    """Return losses and step times per contender, or the reason why there are none.

    Args:
        network: Key of `qat_networks.NETWORKS`.
        mode: `"eager"` or `"compile"`.
        contenders: Keys of `qat_contenders.CONTENDERS`, `"float"` among them.
        rounds: Rounds that count; one before them does not.
        steps: Steps of one contender in one round.
        seed: Seed of the order of contenders.
        tick: Called with a word after each contender's learning and each round.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # several networks of one class: each compiles the same code objects
    given = task(network)
    records: dict[str, Any] = {}
    trainees: dict[str, Trainee] = {}
    for name in contenders:
        try:
            trainees[name], records[name] = _learned(name, given, mode == "compile")
        except Exception as error:
            records[name] = {"failed": told(error)}
        tick(f"{name} learns")
    if "float" not in trainees:
        raise SystemExit(f"{network}, {mode}: the float network itself failed: {records['float']['failed']}")
    times = _rounds(trainees, rounds, steps, seed, tick)
    for name, found in times.items():
        ratios = [own / base for own, base in zip(found, times["float"], strict=True)]
        records[name] |= {
            "ms": round(statistics.median(found) * 1e3, 2),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_quartiles": [round(q, 4) for q in _quartiles(ratios)],
            "ms_rounds": [round(value * 1e3, 2) for value in found],
        }
    return {"layers": len(given.names), "rounds": rounds, "steps": steps, "seed": seed, "contenders": records}


def losses(network: str, mode: str, contender: str) -> list[float]:
    """Return the mean of the first three and of the last three losses of a contender's steps, without timing any.

    Raises:
        Refused: If the loss is not finite or does not fall.
    """
    torch._dynamo.reset()
    found: list[float] = _learned(contender, task(network), mode == "compile")[1]["loss"]
    return found


def _learned(name: str, given: Task, compiled: bool) -> tuple[Trainee, dict[str, Any]]:
    """Return a contender after its first steps, and what they showed.

    Raises:
        Refused: If the loss is not finite or does not fall.
    """
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    started = time.perf_counter()
    trainee = Trainee(CONTENDERS[name], given, compiled)
    first = trainee.step().item()
    seconds = time.perf_counter() - started
    losses = [first, *(trainee.step().item() for _ in range(LEARNING_STEPS - 1))]
    shown = [round(loss, 4) for loss in losses]
    if not all(map(math.isfinite, losses)):
        raise Refused(f"loss not finite: {shown}")
    before, after = statistics.mean(losses[:3]), statistics.mean(losses[-3:])
    if not after < FALL * before:
        raise Refused(f"loss does not fall: {before:.3f} to {after:.3f} in {LEARNING_STEPS} steps")
    record = {"loss": [round(before, 4), round(after, 4)], "seconds_to_first_step": round(seconds, 1)}
    if compiled:  # why a contender may be slower compiled than eager
        record["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
    return trainee, record


def _rounds(
    trainees: dict[str, Trainee], rounds: int, steps: int, seed: int, tick: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds per step of each round."""
    order, draw = list(trainees), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in order}
    for number in range(rounds + 1):
        draw.shuffle(order)
        for name in order:
            gc.collect()
            trainees[name].step()  # one step that does not count: the caches hold another contender's tensors
            started = time.perf_counter()
            for _ in range(steps):
                trainees[name].step()
            if number:
                times[name].append((time.perf_counter() - started) / steps)
        tick(f"round {number}")
    return times


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    quarters = statistics.quantiles(values, n=4, method="inclusive")
    return [quarters[0], quarters[2]]
