"""What a command prints: text or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer

from daqconvert.cli.processes import is_main, number
from daqconvert.errors import DaqError

LATER = 5.0  # seconds in which a launcher ends the other processes when one has failed
WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*?\n(?:\w+\.)*\w*Error: ", re.DOTALL)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with its errors turned into one paragraph and an exit code.

    Args:
        command: A function that typer understands.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except DaqError as error:
            fail(WORKER.sub("", str(error)), 2)
        except OSError as error:
            if error.filename is None:
                raise
            fail(f"{error.filename}: {error.strerror}.", 2)
        except KeyboardInterrupt:
            fail("Interrupted.", 130)

    return run


def fail(text: str, code: int) -> None:
    """Print one paragraph on standard error and leave.

    A process that is not the main one speaks later: where all fail alike, the launcher has ended it by then.

    Args:
        text: What happened.
        code: Exit code.

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
    """Standard output of one command; what libraries print meanwhile goes to standard error.

    Args:
        as_json: Whether one JSON document is printed instead of text.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._stream = sys.stdout

    @contextlib.contextmanager
    def capturing(self) -> Iterator[Output]:
        """Send what anybody else prints to standard error while the context lasts."""
        with contextlib.redirect_stdout(sys.stderr):
            yield self

    def show(self, text: str, document: dict[str, Any]) -> None:
        """Print the text, or the document as JSON; numbers that JSON lacks become null.

        Args:
            text: For people.
            document: The same for programs.
        """
        shown = json.dumps(_plain(document), indent=2, ensure_ascii=False) if self.as_json else text
        print(shown, file=self._stream, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
