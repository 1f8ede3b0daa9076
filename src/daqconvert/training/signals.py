"""Signals during training: SIGTERM and SIGINT end it after the step in progress, SIGUSR1 asks for a checkpoint.

A second SIGINT interrupts at once. Handlers that the caller's program has set itself stay.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from daqconvert.errors import TrainingError

NAMES = ("SIGUSR1", "SIGTERM", "SIGINT")  # the later, the more urgent; Windows has no SIGUSR1


class Ended(Exception):
    """A signal, given by its name, ends training in the middle of an evaluation."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


class Terminated(TrainingError):
    """SIGTERM ended training, after a checkpoint."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM outside of training: what runs ends where it is.

    Raises:
        Terminated: Always.
    """
    raise Terminated("SIGTERM")


USUAL = (signal.SIG_DFL, signal.default_int_handler, terminate)  # handlers that `listening` replaces


class Signals:
    """The signals that came since training started.

    Attributes:
        came: How often each came, in the order of `NAMES`.
    """

    def __init__(self) -> None:
        self.came = [0] * len(NAMES)

    def take(self, came: Sequence[float]) -> tuple[bool, str | None]:
        """Return whether to write a checkpoint, and the name of the signal that ends training, or None.

        `came` is the attribute, or its sum over all processes. The attribute's count of SIGUSR1 goes back to 0, so
        that one request gives one checkpoint.
        """
        ending = next((name for name, n in zip(NAMES[:0:-1], came[:0:-1], strict=True) if n), None)
        asked = bool(came[0]) or ending is not None
        self.came[0] = 0
        return asked, ending


@contextmanager
def listening() -> Iterator[Signals]:
    """Listen to signals while the block runs, if it runs in the main thread; earlier handlers are restored.

    Yields:
        The signals that have come so far.

    Example:
        >>> with listening() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> signals.take(signals.came)
        (True, 'SIGTERM')
    """
    signals, before = Signals(), dict[int, Any]()

    def heard(number: int, frame: FrameType | None) -> None:
        signals.came[NAMES.index(signal.Signals(number).name)] += 1
        if number == signal.SIGINT:  # a second one interrupts at once
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in USUAL:
                before[number] = signal.getsignal(number)
                signal.signal(number, heard)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
