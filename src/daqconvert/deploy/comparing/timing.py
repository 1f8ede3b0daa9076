"""Latency of several models, timed in turns, each in a process of its own.

The thread pools of two sessions of ONNX Runtime in one process spin, and take processors from each other even while
they wait; so do those of torch and ONNX Runtime. So each model that is timed, a *contender*, is opened in a new
process, and while one is timed the others wait. The speed of a machine changes from minute to minute: there are
several rounds, in each of which every contender has a turn, so that such changes meet all contenders. Times are in
seconds per call.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daqconvert.deploy.onnx.runtime import OnnxModel
from daqconvert.errors import DaqError, ExportError

ROUNDS, REPEATS, WARMUP = 5, 20, 3
Call = Callable[[], object]
Opener = Callable[[int], Call]
"""Takes a number of threads and returns the call that is timed. It runs in the new process, so it must be picklable: a
module-level function, or a `partial` of one."""


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        median: Median over the rounds of the median within a round, in seconds per call.
        p95: 95th percentile over the calls of all rounds together, in seconds per call.
        rounds: The median of each round.
    """

    median: float
    p95: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: list[list[float]]) -> Timing:
        """Return the times of a contender from the seconds of each call, listed by round; no round is empty.

        Example:
            >>> Timing.of([[1.0, 2.0, 9.0], [1.0, 4.0, 5.0]])
            Timing(median=3.0, p95=9.0, rounds=(2.0, 4.0))
        """
        medians = tuple(statistics.median(times) for times in rounds)
        ordered = sorted(value for times in rounds for value in times)
        return cls(statistics.median(medians), ordered[-(-95 * len(ordered) // 100) - 1], medians)


def onnx_opener(path: str | Path, *tensors: Tensor) -> Opener:
    """Return the opener of an ONNX file that is called with these tensors."""
    return partial(_open_onnx, str(path), tuple(tensor.numpy() for tensor in tensors))


def _open_onnx(path: str, arrays: tuple[Any, ...], threads: int) -> Call:
    model = OnnxModel(path, threads=threads)
    return model.bound(*(torch.from_numpy(array) for array in arrays))


def time_in_turns(
    openers: Mapping[str, Opener], threads: int, rounds: int = ROUNDS, repeats: int = REPEATS, warmup: int = WARMUP,
    tick: Callable[[str], None] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Return the times of every contender, by name.

    Args:
        openers: The contenders, by name.
        threads: Threads of one contender.
        rounds: Number of turns of each contender.
        repeats: Number of timed calls in a turn.
        warmup: Number of calls before them that are not timed, because caches hold another contender's tensors.
        tick: Called with a contender's name when it is opened and after each of its turns.

    Raises:
        ExportError: If a contender cannot be opened or fails; the message names it.
        ValueError: If `threads`, `rounds` or `repeats` is below 1.
    """
    if min(threads, rounds, repeats) < 1:
        raise ValueError(f"expected 1 or more; found threads={threads}, rounds={rounds}, repeats={repeats}")
    tell = tick or (lambda name: None)
    found: dict[str, list[list[float]]] = {name: [] for name in openers}
    with _processes(openers, threads) as pipes:
        for name, pipe in pipes.items():
            _receive(name, pipe)  # opened
            tell(name)
        for number in range(rounds):
            names = list(pipes)
            for name in names[number % len(names) :] + names[: number % len(names)]:  # each round begins with another
                pipes[name].send((repeats, warmup))
                found[name].append(_receive(name, pipes[name]))
                tell(name)
    return {name: Timing.of(times) for name, times in found.items()}


@contextmanager
def _processes(openers: Mapping[str, Opener], threads: int) -> Iterator[dict[str, Any]]:
    """Yield a pipe to each contender's process; closing it ends the process."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    workers = []
    try:
        for name, opener in openers.items():
            pipes[name], there = context.Pipe()
            worker = context.Process(target=_serve, args=(there, opener, threads), daemon=True)
            worker.start()
            there.close()
            workers.append(worker)
        yield pipes
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers:
            worker.join(timeout=10)
            if worker.is_alive():
                worker.terminate()


def _receive(name: str, pipe: Any) -> list[float]:
    try:
        answer = pipe.recv()
    except EOFError:
        raise ExportError(f"{name}: the process that times it ended too early.") from None
    if isinstance(answer, str):
        raise ExportError(f"{name}: {answer}")
    return list(answer)


def _serve(pipe: Any, opener: Opener, threads: int) -> None:
    """Open a contender, and time it whenever the pipe asks for times, until the pipe is closed."""
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            call = opener(threads)
            pipe.send([])
            while True:
                repeats, warmup = pipe.recv()
                pipe.send(_times(call, repeats, warmup))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return
    except Exception as error:  # NOTE: a contender is a user's model and may raise anything; the parent reports it
        what = str(error) if isinstance(error, DaqError) else f"{type(error).__name__}: {str(error)[:400]}"
        pipe.send(what)


def _times(call: Call, repeats: int, warmup: int) -> list[float]:
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
