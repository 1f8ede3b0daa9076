"""What a command prints: text or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import typer

from daqconvert.cli.processes import is_main, number
from daqconvert.errors import DaqError
from daqconvert.spec import Plan

LATER = 5.0  # seconds in which a launcher ends the other processes when one has failed
WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*?\n(?:\w+\.)*\w*Error: ", re.DOTALL)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose errors become one paragraph on standard error, and an exit code."""

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


def bits_text(plan: Plan) -> str:
    """Return the bits that most layers of a plan have, as `W4A4`.

    Example:
        >>> bits_text(Plan((), "Net"))
        'float'
    """
    found = Counter((row.settings.w_bits or 32, row.settings.a_bits or 32) for row in plan if row.settings)
    return "W{}A{}".format(*found.most_common(1)[0][0]) if found else "float"
