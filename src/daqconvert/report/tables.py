"""Tables for people: a `Plan`, or any rows, as a `rich` table; `render` turns one into plain text.

The lines are those of Markdown, so that a table reads well in a terminal and can be pasted into a page. Numbers are
decimal: `k` is 1,000, `MB` is 1,000,000 bytes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from daqconvert.spec import Plan, PlanRow, Totals

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

PLAN_COLUMNS = ("layer", "type", "weight", "input", "params", "MACs", "BOPs", "bytes", "decided by", "remarks")
PLAN_NUMBERS = ("params", "MACs", "BOPs", "bytes")
ORDER_TEXTS = {"fx": "order by torch.fx", "modules": "order by registration (torch.fx cannot tell)"}
WIDEST = 10_000
"""More columns than any table has; `rich` wants a number."""


def short_number(value: float | None) -> str:
    """Return a count, which is not negative, with three significant digits and a decimal prefix; `-` for None.

    Example:
        >>> short_number(999), short_number(9408), short_number(1.8e9), short_number(None)
        ('999', '9.41k', '1.8G', '-')
    """
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G"):
        digits = f"{value:.3g}"
        if float(digits) < 1000:
            return digits + prefix
        value /= 1000
    return f"{value:.3g}T"


def plan_table(plan: Plan) -> Table:
    """Return a table of the plan: a row per site, those left alone dimmed, and the totals below.

    BOPs are MACs times the bits of weight and of input, 32 for float. `-` stands for an unknown number, which no sum
    counts. A remark that several rows share is written once, below the table, and numbered in the rows.

    Example:
        >>> print(render(plan_table(Plan((), "Net", policy="paper-w1a1"))).splitlines()[0])
        Net: policy paper-w1a1, order by torch.fx
    """
    aim = "" if plan.target is None else f", target {plan.target}"
    title = f"{plan.model}: policy {plan.policy}{aim}, {ORDER_TEXTS.get(plan.order, plan.order)}"
    if plan.input_size:
        title += f", input {'x'.join(map(str, plan.input_size))}"
    table = _table(title, PLAN_COLUMNS, right=PLAN_NUMBERS)
    counts = Counter(note for row in plan for note in (row.reason, *row.notes) if note)
    shared = {note: f"({i})" for i, note in enumerate((note for note in counts if counts[note] > 1), start=1)}
    for row in plan:
        table.add_row(*map(_text, _plan_cells(row, shared)), style=None if row.converted else "dim")
    other, totals = plan.other_params, plan.totals
    if other:
        numbers = (short_number(other), "-", "-", _bytes(4 * other))
        cells = ("(others)", "", "float", "", *numbers, "-", "parameters and buffers outside these layers")
        table.add_row(*map(_text, cells), style="dim")
    sums = tuple(short_number(value) for value in (totals.params, totals.macs, totals.bops))
    done = f"{totals.converted} of {totals.sites}"
    footers = ("total", done, "", "", *sums, _bytes(totals.bytes), "", _in_float(totals))
    for column, footer in zip(table.columns, footers, strict=True):
        column.footer = _text(footer)
    table.show_footer = True
    if shared:
        table.caption = _text_lines(f"{number} {note}" for note, number in shared.items())
    return table


def _plan_cells(row: PlanRow, shared: Mapping[str, str]) -> tuple[str, ...]:
    site = row.site
    remarks = [shared.get(note, note) for note in (row.reason, *row.notes) if note]
    params = None if row.float_bytes is None else site.params
    numbers = (*map(short_number, (params, site.macs, row.bops)), _bytes(row.weight_bytes))
    texts = (row.weight_text, row.input_text)
    return (row.name or "(root)", site.kind, *texts, *numbers, row.rule, "; ".join(remarks))


def _in_float(totals: Totals) -> str:
    """Return in words what the totals are in float32, and what they leave out."""
    words = [f"{_bytes(totals.float_bytes)} in float32"]
    if totals.float_bops is not None:
        words[0] = f"{short_number(totals.float_bops)} BOPs, {words[0]}"
    if totals.scale_bytes:
        words.append(f"scales {_bytes(totals.scale_bytes)} besides")
    if totals.unknown_macs and totals.macs is not None:
        words.append(f"MACs of {totals.unknown_macs} unknown")
    if totals.unknown_bytes:
        words.append(f"size of {totals.unknown_bytes} unknown")
    return "; ".join(words)


def _bytes(value: float | None) -> str:
    text = short_number(value)
    if value is None:
        return text
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def simple_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table of any rows, with a title above it unless that is `""`; columns of numbers are right-aligned.

    Of the cells, texts stay as they are, floats get four significant digits, and None is shown as `-`.

    Raises:
        ValueError: If a row has another length than `columns`.

    Example:
        >>> print(render(simple_table("", ("model", "top-1"), [("float", 96.52391), ("W4A4", None)])))
        | model | top-1 |
        |-------|-------|
        | float | 96.52 |
        | W4A4  |     - |
    """
    cells = [tuple(row) for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(
                f"expected {len(columns)} cells, one for each of {list(columns)}; found {len(row)}: {row}"
            )
    right = [name for i, name in enumerate(columns) if cells and all(_is_number(row[i]) for row in cells)]
    table = _table(title, columns, right=right)
    for row in cells:
        table.add_row(*(_text(_cell(value)) for value in row))
    return table


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(title: str, columns: Sequence[str], right: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=_text(title) if title else None, box=box.MARKDOWN, title_justify="left", title_style="bold")
    table.caption_justify, table.caption_style = "left", "none"
    for name in columns:
        table.add_column(_text(name), justify="right" if name in right else "left", overflow="fold")
    return table


def _text(value: str) -> Text:
    """Return text that `rich` prints as it is: `[a-z]` is no markup, and no control character reaches the terminal."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value))


def _text_lines(lines: Iterable[str]) -> Text:
    from rich.text import Text

    return Text("\n").join(map(_text, lines))


def render(table: Table, width: int | None = None) -> str:
    """Return a table as plain text without colours and without blanks at the ends of lines.

    A line has at most `width` characters, and longer cells are folded; None is as wide as the table needs.

    Example:
        >>> print(render(simple_table("", ("name",), [("abcdefgh",)]), width=9))
        | name  |
        |-------|
        | abcde |
        | fgh   |
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width or WIDEST, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")
