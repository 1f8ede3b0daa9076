"""Time per image of a torch model and of ONNX files, taken in turns.

Each ONNX file runs in a process of its own: the thread pools of two sessions in one process spin against each other
and spoil both. Images go one at a time; a figure is the median over rounds of the median within a round, in seconds.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.deploy.runtime import OnnxModel, time_session
from daqconvert.errors import ExportError

ROUNDS, REPEATS, WARMUP = 5, 20, 3


def time_models(model: nn.Module, files: Mapping[str, Path], image: Tensor) -> dict[str, float]:
    """Return seconds per image of a torch model (as `"torch"`) and of ONNX files, by name.

    Args:
        model: On the CPU, in evaluation mode.
        files: Names and ONNX files.
        image: One image, `(1, C, H, W)`.

    Raises:
        ExportError: If a file cannot be timed.
    """
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    workers = []
    for name, path in files.items():
        here, there = context.Pipe()
        worker = context.Process(target=_serve, args=(there, str(path), image.numpy(), threads), daemon=True)
        worker.start()
        there.close()
        workers.append((name, here, worker))
    times: dict[str, list[float]] = {name: [] for name in ("torch", *files)}
    try:
        for _, here, _ in workers:
            _receive(here)  # loaded
        for _ in range(ROUNDS):
            times["torch"].append(_time_torch(model, image))
            for name, here, _ in workers:
                here.send("go")
                times[name].append(_receive(here))
    finally:
        for _, here, worker in workers:
            here.close()  # ends the worker
            worker.join(timeout=10)
    return {name: statistics.median(values) for name, values in times.items()}


def _receive(pipe: Any) -> float:
    try:
        answer = pipe.recv()
    except EOFError:
        raise ExportError("The process that times an ONNX file ended too early.") from None
    if isinstance(answer, str):
        raise ExportError(answer)
    return float(answer)


def _time_torch(model: nn.Module, image: Tensor) -> float:
    times = []
    with torch.no_grad():
        for index in range(WARMUP + REPEATS):
            start = time.perf_counter()
            model(image)
            if index >= WARMUP:
                times.append(time.perf_counter() - start)
    return statistics.median(times)


def _serve(pipe: Any, path: str, image: Any, threads: int) -> None:
    """Time a file whenever asked, until nobody asks any more."""
    try:
        session = OnnxModel(path, threads=threads)
        pipe.send(0.0)
        while True:
            pipe.recv()
            pipe.send(time_session(session, torch.from_numpy(image), repeats=REPEATS, warmup=WARMUP))
    except EOFError:
        return
    except ExportError as error:
        pipe.send(str(error))
