"""Writing files and directories completely or not at all: under a temporary name beside the target, then a rename.

The temporary name is hidden: `.NAME.MACHINE-PID-RANDOM.tmp`. A process that is killed leaves its temporary file
behind. The next process that writes to the same path on the same machine sees that no process has the id PID any more,
and removes the file.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from daqconvert.errors import DaqError

MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # a process id means nothing on another machine


@contextmanager
def replacing(path: Path, error: type[DaqError], hint: str = "") -> Iterator[Path]:
    """Yield a temporary path to write a file to; the file replaces `path` if the block succeeds, else it is removed.

    Missing parent directories are made, and removed again on failure.

    Raises:
        DaqError: Of class `error`, ending in `hint`, if the file cannot be written. An existing file is unchanged.
    """
    with _writing(path, error, hint) as real:
        temporary = _beside(real, "tmp")
        try:
            temporary.touch()
            usual = temporary.stat().st_mode  # of the user's umask; safetensors gives files to their owner alone
            temporary.unlink()
            yield temporary
            temporary.chmod(usual)
            flush(temporary)
            temporary.replace(real)
            flush(real.parent)  # so that the new name is on the disk too
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, error: type[DaqError], hint: str = "") -> Iterator[Path]:
    """Yield an empty temporary directory; if the block succeeds, it replaces `path` and all of its contents.

    Raises:
        DaqError: Of class `error`, ending in `hint`, if it cannot be written. An existing directory is unchanged.
    """
    with _writing(path, error, hint) as real:
        temporary = _beside(real, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                file.chmod(temporary.stat().st_mode & 0o666)
                flush(file)
            flush(temporary)
            if not real.exists():
                temporary.rename(real)
            elif not _exchange(temporary, real):
                exchange_in_steps(temporary, real)
            flush(real.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str, error: type[DaqError], hint: str = "") -> None:
    """Write or replace a UTF-8 text file; on failure raise `error`, whose message ends in `hint`."""
    with replacing(path, error, hint) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files and directories that killed processes left when they wrote to `path`.

    If such a process had moved a directory aside (`.old`) and not yet replaced it, the directory is moved back.
    """
    for leftover in _leftovers(path):
        if leftover.suffix == ".old" and not path.exists():
            leftover.rename(path)
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make sure that a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path, error: type[DaqError], hint: str) -> Iterator[Path]:
    """Make the parents of `path`; on failure remove those that were made, and raise file errors as `error`.

    Yields:
        The path to write to: `path` itself or, if `path` is a symbolic link, its target, so that the link is kept.
    """
    made: list[Path] = []
    try:
        try:
            real = path.resolve() if path.is_symlink() else path
            for folder in [p for p in reversed(real.parents) if not p.exists()]:
                folder.mkdir()
                made.append(folder)
            remove_leftovers(real)
            yield real
        except BaseException:
            for folder in reversed(made):
                with suppress(OSError):  # another process may have put something in it since
                    folder.rmdir()
            raise
    except (OSError, SafetensorError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause).splitlines()[0]
        raise error(f"{path}: could not be written ({reason}). What was there before is unchanged. {hint}") from cause


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


def _leftovers(path: Path) -> list[Path]:
    """Return the temporary files and directories for `path` whose process is gone."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{MACHINE}-(\d+)-[0-9a-f]{{8}}\.(tmp|old)")
    owners = {p: pattern.fullmatch(p.name) for p in path.parent.iterdir()}
    return [p for p, match in owners.items() if match and not _is_running(int(match[1]))]


def _is_running(pid: int) -> bool:
    if os.name != "posix":
        return True  # NOTE: only POSIX has signal 0, which tests for a process without any effect on it
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, so that both exist at every moment; return False if the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def exchange_in_steps(new: Path, path: Path) -> None:
    """Replace the directory `path` by its sibling `new`, with two renames; on failure the old one is renamed back."""
    old = _beside(path, "old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
