"""TensorBoard's event files, one written without a thread.

torch's `SummaryWriter` writes from a thread of its own, in which a full disk is an error that nobody can catch. The
records are its own all the same: torch makes the summaries, tensorboard frames them.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daqconvert.training.appended import telling


class EventFile:
    """A file of scalars for TensorBoard.

    Args:
        folder: For the file; made where it is not there.
        purge: What an earlier file of the folder says of this step and later ones is not shown; None for nothing.

    Raises:
        ImportError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, purge: int | None = None) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar

        self._event, self._records, self._scalar = event_pb2.Event, RecordWriter, scalar
        self._told: set[Path] = set()
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        events = [self._event(wall_time=time.time(), file_version="brain.Event:2")]
        if purge is not None:
            status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events.append(self._event(wall_time=time.time(), step=purge, session_log=status))
        self._write(events)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars.

        Args:
            step: Optimizer steps so far.
            scalars: By tag.
        """
        now = time.time()
        self._write(
            [self._event(wall_time=now, step=step, summary=self._scalar(tag, value)) for tag, value in scalars.items()]
        )

    def _write(self, events: list[Any]) -> None:
        framed = io.BytesIO()
        records = self._records(framed)
        for event in events:
            records.write(event.SerializeToString())
        with telling(self.path, self._told):
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open("ab") as file:
                file.write(framed.getvalue())
