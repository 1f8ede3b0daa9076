"""Files and directories that are there whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from daqconvert.errors import DaqError


@contextmanager
def replacing(path: Path, error: type[DaqError], hint: str = "") -> Iterator[Path]:
    """Yield a temporary path beside `path`; put it in its place if the block succeeds, remove it if not.

    Args:
        path: The file to write or replace; missing parent directories are made, and removed again on failure.
        error: Class of the error raised if the file cannot be written.
        hint: What to do about it, the last words of that error.

    Yields:
        Where to write.

    Raises:
        DaqError: Of class `error`, as on a full disk; what was there before is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _making_parents(path, error, hint):
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)  # the new name is on the disk too
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, error: type[DaqError], hint: str = "") -> Iterator[Path]:
    """Yield a temporary directory beside `path`; put it in its place if the block succeeds, remove it if not.

    Args:
        path: The directory to write or replace.
        error: Class of the error raised if it cannot be written.
        hint: What to do about it, the last words of that error.

    Yields:
        An empty directory to write into.

    Raises:
        DaqError: Of class `error`; what was there before is unchanged.
        OSError: Never leaves this function: it becomes `error`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _making_parents(path, error, hint):
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                flush(file)
            if path.exists():
                path.replace(old)
            try:
                temporary.replace(path)
            except OSError:
                if old.exists():
                    old.replace(path)
                raise
            flush(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str, error: type[DaqError], hint: str = "") -> None:
    """Write a UTF-8 text file in one go.

    Args:
        path: The file to write or replace.
        text: All of it.
        error: Class of the error raised if it cannot be written.
        hint: What to do about it.
    """
    with replacing(path, error, hint) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def flush(path: Path) -> None:
    """Make sure that a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _making_parents(path: Path, error: type[DaqError], hint: str) -> Iterator[None]:
    """Make the parents of `path`; on failure remove those made, and turn file errors into `error`."""
    made: list[Path] = []
    try:
        for folder in [p for p in reversed(path.parents) if not p.exists()]:
            folder.mkdir()
            made.append(folder)
        yield
    except (OSError, SafetensorError) as cause:
        for folder in reversed(made):
            shutil.rmtree(folder, ignore_errors=True)
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
        raise error(f"{path}: could not be written ({reason}). What was there before is unchanged. {hint}") from cause
    except BaseException:
        for folder in reversed(made):
            shutil.rmtree(folder, ignore_errors=True)
        raise
