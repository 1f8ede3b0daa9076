"""Progress of something long: a bar on standard error if that is a terminal, nothing at all otherwise.

One display at a time: a bar that starts while another is shown becomes a further line of the same display.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

T = TypeVar("T")

_shown: list[Progress] = []  # the display on the terminal now, if any; a terminal has room for one


class Bar:
    """One line of progress.

    Attributes:
        done: Steps advanced so far.
    """

    def __init__(self, display: Progress | None = None, task: TaskID | None = None) -> None:
        self.done = 0
        self._display, self._task = display, task

    @property
    def shown(self) -> bool:
        """Whether the bar is shown on a terminal."""
        return self._display is not None

    def advance(self, n: int = 1, **fields: object) -> None:
        """Count `n` more steps, and show `fields`, such as `loss=0.25`, behind the bar until the next call.

        Floats get four significant digits, but `top1` is a share and written as percent, `per_s` is a number of inputs
        per second, and `lr` and `q_lr` get two digits.

        Example:
            >>> with progress(total=10, description="calibrate") as bar:
            ...     bar.advance(3, batch=3)
            >>> bar.done
            3
        """
        self.done += n
        if self._display is not None and self._task is not None:
            shown = "  ".join(_text(name, value) for name, value in fields.items())
            self._display.update(self._task, advance=n, fields=shown)


def _text(name: str, value: object) -> str:
    if name == "top1" and isinstance(value, float):
        return f"top-1 {100 * value:.2f} %"
    if name == "per_s" and isinstance(value, float):
        return f"{value:.0f}/s"
    if name in ("lr", "q_lr") and isinstance(value, float):
        return f"{name} {value:.2g}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


@contextmanager
def progress(total: int | None, description: str, *, enabled: bool = True) -> Iterator[Bar]:
    """Show a progress bar while the block runs, and take it away afterwards, on exceptions too.

    A total of None means that the number of steps is not known. All but the first of several processes pass
    `enabled=False`, and show nothing.

    Yields:
        The bar, whose `advance` counts.

    Example:
        >>> with progress(total=2, description="calibrate") as bar:
        ...     bar.advance()
    """
    if not (enabled and _is_terminal()):
        yield Bar()
        return
    outermost = not _shown
    if outermost:
        _shown.append(_display())
        _shown[0].start()
    display = _shown[0]
    task = display.add_task(description, total=total, fields="")
    try:
        yield Bar(display, task)
    finally:
        display.remove_task(task)
        if outermost:
            display.stop()
            _shown.remove(display)


def track(iterable: Iterable[T], description: str, total: int | None = None, *, enabled: bool = True) -> Iterator[T]:
    """Yield the items of `iterable` while a progress bar counts them.

    If `total` is None, it is `len(iterable)`; if there is no length, the bar shows no end.

    Example:
        >>> sum(track([1, 2, 3], "adding"))
        6
    """
    if total is None:
        try:
            total = len(iterable)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # no length, or a DataLoader over a stream
            total = None
    with progress(total, description, enabled=enabled) as bar:
        for item in iterable:
            yield item
            bar.advance()


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _display() -> Progress:
    from rich import progress as bars
    from rich.console import Console
    from rich.table import Column

    def fixed(width: int) -> Column:
        """Return a column that keeps its width on a narrow terminal, where bar and fields shrink."""
        return Column(no_wrap=True, min_width=width)

    return bars.Progress(
        bars.TextColumn("{task.description}", markup=False, table_column=fixed(10)),
        bars.BarColumn(bar_width=24, table_column=Column(min_width=6)),
        bars.MofNCompleteColumn(table_column=fixed(7)),
        bars.TimeElapsedColumn(table_column=fixed(7)),
        bars.TextColumn("left"),
        bars.TimeRemainingColumn(table_column=fixed(7)),
        bars.TextColumn("{task.fields[fields]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=Console(stderr=True, force_terminal=True),
        transient=True,
    )
