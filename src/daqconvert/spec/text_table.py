"""Plain text in aligned columns, for `str(plan)` and `str` of reports; tables with lines are in `report`."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return a line for each row, two spaces between columns; columns whose index is in `right` are right-aligned.

    Example:
        >>> text_table([("a", "n", "why"), ("bc", "12", "")], right={1})
        ['a    n  why', 'bc  12']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
