"""What a command prints: text or one JSON document on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import typer

from daqconvert.errors import DaqError

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

    Args:
        text: What happened.
        code: Exit code.

    Raises:
        typer.Exit: Always.
    """
    print(" ".join(text.split()), file=sys.stderr)
    raise typer.Exit(code)


def say(text: str) -> None:
    """Print a line of progress on standard error."""
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
