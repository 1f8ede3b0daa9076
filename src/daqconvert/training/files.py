"""Files that are there whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from daqconvert.errors import TrainingError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; put it in its place if the block succeeds, remove it if not.

    Args:
        path: The file to write or replace.

    Yields:
        Where to write.

    Raises:
        TrainingError: If the file cannot be written, as on a full disk; the file that was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)  # the new name is on the disk too
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: could not be written ({_reason(error)}). What was there before is unchanged. "
            "Free some space or choose another out_dir, then go on with resume=True."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one go; raises `TrainingError` if that fails."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files that a killed process left beside `path`."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
