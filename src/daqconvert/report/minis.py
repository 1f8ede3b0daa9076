"""Small charts of one layer, as SVG by hand: there may be hundreds on a page, and each must be small and quick.

Colours are the variables of the page's style, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from daqconvert.report.html import text

WIDTH, HEIGHT = 110, 56
BARS = 64  # more levels than this are drawn several to a bar
POINTS = 80  # more epochs than this are thinned out


def histogram(now: Sequence[int], start: Sequence[int] | None, label: str) -> str:
    """Return bars of the share of weights on each level; an outline shows where they were at the start.

    Args:
        now: Number of weights by level.
        start: The same before the first step, or None; left out where the number of levels is another.
        label: What it shows, for those who cannot see it.

    Example:
        >>> histogram([1, 3], None, "levels").count("v-")  # bars
        2
    """
    bars = _shares(now)
    before = _shares(start) if start is not None and len(start) == len(now) else None
    top = max([1e-9, *bars, *(before or [])])
    width = WIDTH / len(bars)
    gap = 0.12 * width if len(bars) > 1 else 0.0
    shapes = "".join(
        f"M{_n(i * width + gap)} {HEIGHT}v{_n(-HEIGHT * share / top)}h{_n(width - 2 * gap)}V{HEIGHT}z"
        for i, share in enumerate(bars)
        if share > 0
    )
    drawn = f'<path d="{shapes}" fill="var(--c1)" opacity=".8"/>'
    if before is not None:
        outline = "".join(f"V{_n(HEIGHT * (1 - share / top))}h{_n(width)}" for share in before)
        drawn += f'<path d="M0 {HEIGHT}{outline}V{HEIGHT}" fill="none" stroke="var(--c2)" stroke-width="1"/>'
    return _svg(label, drawn)


def lines(series: Sequence[tuple[str, Sequence[float | None]]], label: str) -> str:
    """Return lines over the epochs on one scale that holds 0; values that are missing or not finite leave a gap.

    Args:
        series: Colour (a variable of the page's style, as `--c1`) and values.
        label: What it shows, for those who cannot see it.

    Example:
        >>> lines([("--c1", [1.0, None, 2.0, 3.0])], "upper").count("L")  # from 2 to 3; the gap leaves a point
        1
    """
    finite = [v for _, values in series for v in values if v is not None and math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    span = (high - low) or 1.0
    zero = _n(2 + (HEIGHT - 4) * high / span)
    drawn = f'<path d="M0 {zero}H{WIDTH}" stroke="var(--line)" stroke-width="1"/>'
    for color, values in series:
        drawn += (
            f'<path d="{_path(values, high, span)}" fill="none" stroke="var({color})" stroke-width="1.6" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )
    return _svg(label, drawn)


def _path(values: Sequence[float | None], high: float, span: float) -> str:
    step = max(1, -(-len(values) // POINTS))
    places = [*range(0, len(values) - 1, step), len(values) - 1] if values else []
    path, pen = "", False
    for place in places:
        value = values[place]
        if value is None or not math.isfinite(value):
            pen = False
            continue
        x = 2 + (WIDTH - 4) * place / max(1, len(values) - 1)
        path += f"{'L' if pen else 'M'}{_n(x)} {_n(2 + (HEIGHT - 4) * (high - value) / span)}"
        pen = True
    return path + ("h.01" if len(places) == 1 and path else "")  # a single point is a dot


def _shares(counts: Sequence[int]) -> list[float]:
    total, step = sum(counts) or 1, -(-len(counts) // BARS)
    return [sum(counts[i : i + step]) / total for i in range(0, len(counts), step)]


def _svg(label: str, drawn: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}"><title>{text(label)}</title>'
        f'<path d="M0 {HEIGHT}H{WIDTH}" stroke="var(--line)" stroke-width="1"/>{drawn}</svg>'
    )


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
