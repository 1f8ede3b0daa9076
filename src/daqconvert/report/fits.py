"""Layers and blocks that were fitted to the float model before training, and their tables on the page of a run.

An error is relative to the float output: `||y_q - y||^2 / ||y||^2`, over all batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from daqconvert.report.html import folded_table, number, text

OPEN = 40  # rows that are shown at first; the others are folded away
WIDTH = 10.0  # em, of the largest error's bar
COLUMNS = ("name", "error before", "error after", "")
HEADINGS = {
    "gptq": "Levels of weights chosen by GPTQ: error of the layer's output",
    "reconstruct": "Blocks reconstructed: error of the block's output",
}


@dataclass(frozen=True)
class Fitted:
    """One layer or block, fitted or left alone.

    Attributes:
        name: Name of the module.
        before: Error of its output before it was fitted.
        after: Error of its output afterwards.
        left_alone: Why it was not fitted, in which case the errors mean nothing; `""` if it was fitted.
    """

    name: str
    before: float = 0.0
    after: float = 0.0
    left_alone: str = ""


def fit_tables(fitted: Mapping[str, Sequence[Fitted]]) -> str:
    """Return a table for each field of the recipe that fitted something; bars are blue before and orange after.

    Example:
        >>> fit_tables({"reconstruct": [Fitted("layer1", 0.5, 0.25)]}).count("width:5.00em")
        1
    """
    return "".join(f"<h3>{text(HEADINGS.get(field, field))}</h3>{_table(rows)}" for field, rows in fitted.items())


def _table(rows: Sequence[Fitted]) -> str:
    largest = max((max(row.before, row.after) for row in rows), default=0.0) or 1.0
    return folded_table(COLUMNS, [_cells(row, largest) for row in rows], "more", shown=OPEN, numbers=COLUMNS[1:3])


def _cells(row: Fitted, largest: float) -> list[str]:
    if row.left_alone:
        return [text(row.name), "-", "-", f'<span class="soft">left as it is: {text(row.left_alone)}</span>']
    bars = "<br>".join(
        f'<span class="bar" style="width:{WIDTH * error / largest:.2f}em;background:var({color})"></span>'
        for error, color in ((row.before, "--c1"), (row.after, "--c2"))
    )
    return [text(row.name), number(row.before, 3), number(row.after, 3), bars]
