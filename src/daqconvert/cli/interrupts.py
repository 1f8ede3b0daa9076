"""SIGTERM and Ctrl-C during a run: one line that says how to go on, and the exit code that shells expect."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from daqconvert.cli.job import Job
from daqconvert.cli.output import fail
from daqconvert.cli.processes import count
from daqconvert.training.signals import Terminated

INTERRUPTED, TERMINATED = 130, 143


@contextmanager
def stoppable(out: Path, job: Job) -> Iterator[None]:
    """End the command when the block is interrupted or SIGTERM comes, saying how to go on.

    Args:
        out: The run directory.
        job: Of the run.
    """
    try:
        with _sigterm(_raise):
            yield
    except KeyboardInterrupt:
        fail(f"Interrupted. {_go_on(out, job)}", INTERRUPTED)
    except Terminated:
        fail(f"Stopped by SIGTERM. {_go_on(out, job)}", TERMINATED)


@contextmanager
def training() -> Iterator[None]:
    """Leave SIGTERM to `finetune`, which ends after the step in progress, with a checkpoint."""
    with _sigterm(signal.SIG_DFL):
        yield


@contextmanager
def _sigterm(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated("SIGTERM")


def _go_on(out: Path, job: Job) -> str:
    again = f"{shlex.quote(str(job.source))} " if job.source.kind == "import" else ""  # code is named again
    how = ", started by the launcher as before" if count() > 1 else ""
    return f"Go on with: daqconvert finetune {again}--out {shlex.quote(str(out))} --resume{how}"
