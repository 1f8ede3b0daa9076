"""The log of a run, `log.csv`: one line per epoch, empty where there is no value.

The history in the checkpoint is the truth and the file is written anew from it each time, in one go. So after an
interruption it never holds an epoch that is trained again, nor half a line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daqconvert.errors import TrainingError
from daqconvert.files import write_text
from daqconvert.training.checkpoint import NOT_WRITTEN

Row = dict[str, Any]

COLUMNS = (
    "epoch", "step", "lr", "quantizer_lr", "train_loss", "train_top1", "val_loss", "val_top1", "images_per_second",
    "seconds",
)  # fmt: skip


def csv_text(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the history as CSV with a header: `COLUMNS`, then what else the rows hold.

    Args:
        history: One row per epoch.

    Example:
        >>> csv_text([{"epoch": 1, "train_loss": 0.5}]).splitlines()[1]
        '1,,,,0.5,,,,,'
    """
    stream = io.StringIO()
    columns = list(dict.fromkeys((*COLUMNS, *(key for row in history for key in row))))
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)  # None is written as nothing
    return stream.getvalue()


def write_log(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write `log.csv`; raises `TrainingError` if that fails."""
    write_text(path, csv_text(history), TrainingError, NOT_WRITTEN)
