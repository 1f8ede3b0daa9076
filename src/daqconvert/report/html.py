"""Pieces of HTML: escaped text, tables, and a whole page, which has no script, loads nothing, and has a dark mode."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f6f7f9; --ink: #1c2230; --soft: #5c6575; --line: #dde1e8;
  --c1: #1f5fa8; --c2: #c8541b; --c3: #2f8f4e; --c4: #7a4fa3; --warn: #9a5b00; --warnbg: #fff5e0; --good: #1d6b38; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151b; --panel: #1b2029; --ink: #e4e8ef; --soft: #98a2b3;
  --line: #323a47; --c1: #6fb1ff; --c2: #ff9a5e; --c3: #66cf8b; --c4: #c39bee; --warn: #ffc66b; --warnbg: #33280f;
  --good: #7fdc9f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
h3 { font-size: .95rem; margin: 0; overflow-wrap: anywhere; }
.scroll + h3 { margin-top: 1.4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
code, pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem;
  margin: .5rem 0; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.cards { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 1.3rem 0 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .82rem; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(430px, 100%), 1fr)); }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: .6rem .8rem; }
figure > svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .82rem; color: var(--soft); }
.layers { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); }
.layer { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .6rem .8rem; }
.layer .row { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6rem; margin-top: .35rem; }
.layer svg { width: 100%; height: auto; display: block; } .layer small { color: var(--soft); font-size: .74rem; }
.layer small, .layer h3 + p { display: block; margin: 0; line-height: 1.35; } .layer h3 + p { font-size: .78rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; padding: .28rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } td { overflow-wrap: break-word; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.mark td { font-weight: 650; }
.bar { display: inline-block; height: .62em; border-radius: 2px; margin-right: .45em; }
.bits { white-space: nowrap; } .bits i { font-style: normal; display: inline-block; min-width: 2.6em; }
.facts { display: grid; gap: 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); }
.facts h3 { margin-bottom: .35rem; } .facts td:first-child { color: var(--soft); width: 45%; }
.warnings { list-style: none; margin: 0; padding: 0; } .warnings li { background: var(--warnbg); border-radius: 8px;
  border-left: 4px solid var(--warn); padding: .5rem .8rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.warnings b { color: var(--warn); font-size: .82rem; margin-right: .5rem; }
.chip { display: inline-block; font-size: .8rem; padding: .05rem .6rem; border: 1px solid var(--line);
  border-radius: 99px; color: var(--soft); vertical-align: middle; }
.chip.done { color: var(--good); border-color: currentColor; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--c1); margin-bottom: .6rem; }
@media print { body { max-width: none; } .card, figure, .layer, li { break-inside: avoid; } }
"""


def text(value: object) -> str:
    r"""Return any value as text of a page: escaped, control characters written out.

    Example:
        >>> text("<a & b>"), text(chr(7))
        ('&lt;a &amp; b&gt;', '\\x07')
    """
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(value)
    )
    return html.escape(shown.encode("utf-8", "backslashreplace").decode("utf-8"))


def number(value: object, digits: int = 4) -> str:
    """Return a float with `digits` significant digits, `-` for None, and anything else as it prints.

    Example:
        >>> number(0.123456), number(12), number(None), number(True)
        ('0.1235', '12', '-', 'True')
    """
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def percent(value: float | None, digits: int = 2) -> str:
    """Return a share as percent, `-` for None.

    Example:
        >>> percent(0.98765), percent(None)
        ('98.77 %', '-')
    """
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[str] = (), marked: int | None = None
) -> str:
    """Return a table; headings are plain text, cells are HTML already.

    The columns whose headings are in `numbers` are right-aligned; the row of index `marked` is printed in bold.
    """
    right = [column in set(numbers) for column in columns]
    head = "".join(f'<th{_kind(r)} scope="col">{text(c)}</th>' for c, r in zip(columns, right, strict=True))
    body = "".join(
        f"<tr{' class=mark' if i == marked else ''}>"
        + "".join(f"<td{_kind(r)}>{cell}</td>" for cell, r in zip(row, right, strict=True))
        + "</tr>\n"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def folded_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], more: str, *, shown: int, numbers: Iterable[str] = ()
) -> str:
    """Return a table whose rows after the first `shown` are folded away, under their number and the words `more`.

    Example:
        >>> folded_table(["a"], [["1"], ["2"], ["3"]], "more", shown=1).count("2 more")
        1
    """
    numbers = list(numbers)
    found, rest = table(columns, rows[:shown], numbers=numbers), rows[shown:]
    if rest:
        found += f"<details><summary>{len(rest)} {more}</summary>{table(columns, rest, numbers=numbers)}</details>"
    return found


def _kind(right: bool) -> str:
    return ' class="n"' if right else ""


def facts(tables: Mapping[str, Mapping[str, object]]) -> str:
    """Return small tables of two columns, side by side: heading -> name -> value."""
    parts = []
    for heading, values in tables.items():
        rows = "".join(
            f"<tr><td>{text(key)}</td><td>{text(number(value, 6))}</td></tr>" for key, value in values.items()
        )
        parts.append(f"<div><h3>{text(heading)}</h3><table><tbody>{rows}</tbody></table></div>")
    return f'<div class="facts">{"".join(parts)}</div>'


def page(title: str, body: str) -> str:
    """Return a whole page; `title` is the title of the window, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )
