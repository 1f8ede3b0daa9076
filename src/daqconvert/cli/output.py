"""What a command prints: text or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer

from daqconvert.cli.options import as_options
from daqconvert.cli.processes import is_main, number
from daqconvert.errors import DaqError

LATER = 5.0  # seconds in which a launcher ends the other processes when one has failed
CLOSED = 141  # what shells give a command that was ended by SIGPIPE
WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*?\n(?:\w+\.)*\w*Error: ", re.DOTALL)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose errors become one paragraph on standard error, and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DaqError as error:
            fail(as_options(WORKER.sub("", str(error))), 2)
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}.", 2)
        except KeyboardInterrupt:
            fail("Interrupted.", 130)

    return run


def fail(text: str, code: int) -> None:
    """Print what happened on standard error, as one paragraph, and end the command.

    A process that is not the main one waits before it prints: where all fail alike, the launcher has ended it by then.

    Raises:
        typer.Exit: Always.
    """
    said = " ".join(text.split())
    if not is_main():
        time.sleep(LATER)
        said = f"process {number()}: {said}"
    print(said, file=sys.stderr, flush=True)
    raise typer.Exit(code)


def say(text: str) -> None:
    """Print a line of progress on standard error, on the main process."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


class Output:
    """Standard output of one command: it holds the command's text or its JSON document, and nothing else."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stream = sys.stdout

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Output]:
        """Send everything but what `show` prints to standard error while the block runs."""
        with contextlib.redirect_stdout(sys.stderr):
            yield self

    def show(self, text: str, document: dict[str, Any]) -> None:
        """Print the text for people, or the document for programs as JSON; numbers that JSON lacks become null."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        unicode = encoding.lower().replace("-", "") == "utf8"
        shown = json.dumps(_plain(document), indent=2, ensure_ascii=not unicode) if self.as_json else text
        with writing(self._stream):
            print(shown.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)


@contextlib.contextmanager
def writing(stream: Any) -> Iterator[None]:
    """End the command, with one line at most, when its standard output takes no more: a full disk, a closed pipe."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        with contextlib.suppress(OSError, ValueError):  # what is left in the buffer would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(CLOSED) from None
        fail(f"Standard output could not be written ({error.strerror}).", 2)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
