"""Writing one file so that it is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daqconvert.errors import ExportError


def check_target(path: str | Path, overwrite: bool) -> Path:
    """Return where a file is to be written.

    Args:
        path: The file; its directory need not exist yet.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ExportError: If there is a directory of that name, or a file that may not be replaced.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"export: {target} is a directory; expected the name of a file, as {target / 'model.onnx'}.")
    if target.exists() and not overwrite:
        raise ExportError(f"export: {target} exists. Pass overwrite=True to replace it, or another name.")
    return target


@contextmanager
def written_whole(target: Path, content: bytes) -> Iterator[Path]:
    """Write beside the target, give that file to the caller, and move it into place when the block ends well.

    Args:
        target: The file to write or replace.
        content: All of it.

    Yields:
        Path of the temporary file, complete.

    Raises:
        ExportError: If it cannot be written; the target is as it was before, and no new directory remains.
    """
    made: list[Path] = []
    temporary: Path | None = None
    try:
        try:
            _make_parents(target.parent, made)
            handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            temporary = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
        except OSError as error:
            raise ExportError(_cannot_write(target, error)) from error
        yield temporary
        try:
            temporary.replace(target)
        except OSError as error:
            raise ExportError(_cannot_write(target, error)) from error
        temporary = None
        made.clear()
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        for folder in reversed(made):
            folder.rmdir()


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, noting each one made."""
    if folder.exists():
        return
    _make_parents(folder.parent, made)
    folder.mkdir()
    made.append(folder)


def _umask() -> int:
    """Return the process's umask; there is no way to read it without setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _cannot_write(target: Path, error: OSError) -> str:
    return f"export: {target} cannot be written: {error.strerror or error}. Nothing was left behind."
