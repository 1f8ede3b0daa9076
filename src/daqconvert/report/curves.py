"""Curves over the epochs, drawn by matplotlib as SVG that stands in a page and takes its colours from there."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from daqconvert.report.html import text

# What is drawn in these colours follows the variables of the page's style: matplotlib knows no variables.
PLACEHOLDERS = {
    "#010203": "var(--ink)", "#040506": "var(--soft)", "#070809": "var(--line)", "#0a0b0c": "var(--c1)",
    "#0d0e0f": "var(--c2)", "#101112": "var(--c3)", "#131415": "var(--c4)",
}  # fmt: skip
INK, SOFT, LINE, *COLORS = PLACEHOLDERS
MOST_MARKS = 40  # more points than this need no marks


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: For the legend; `""` for none.
        x: Epochs.
        y: Values; None and what is not finite leaves a gap.
        color: Index of the colour.
        faint: Whether it stays in the background.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    faint: bool = False


def curve(title: str, lines: Sequence[Line], *, percent: bool = False, log: bool = False, mark: Any = None) -> str:
    """Return a chart as an `<svg>` element; the same values give the same text.

    Args:
        title: Above the chart.
        lines: What to draw.
        percent: Whether the values are shares, written as percent.
        log: Whether the axis is logarithmic; values of 0 and less leave a gap then.
        mark: `(x, y)` of a point to ring, or None.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.0, "axes.unicode_minus": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.0))
        FigureCanvasSVG(figure)
        panel = figure.subplots(gridspec_kw={"left": 0.12, "right": 0.985, "bottom": 0.165, "top": 0.9})
        for line in lines:
            _draw(panel, line, log)
        if mark is not None:
            panel.plot(*([v] for v in mark), "o", ms=11, mfc="none", mec=INK, mew=1.2)
        if log:
            panel.set_yscale("log")
        if percent:
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        _dress(panel, title, any(line.label for line in lines))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), title, lines)


def _draw(panel: Any, line: Line, log: bool) -> None:
    y = [v if v is not None and math.isfinite(v) and (v > 0 or not log) else math.nan for v in line.y]
    marks = {} if line.faint or len(y) > MOST_MARKS else {"marker": "o", "markersize": 3.5}
    width, alpha = (0.9, 0.35) if line.faint else (1.8, 1.0)
    panel.plot(line.x, y, color=COLORS[line.color], linewidth=width, alpha=alpha, label=line.label or "_", **marks)


def _dress(panel: Any, title: str, legend: bool) -> None:
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.set_xlabel("epoch", color=SOFT)
    panel.tick_params(which="both", colors=SOFT, length=3)
    panel.grid(color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    if legend:
        panel.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _inline(svg: str, title: str, lines: Sequence[Line]) -> str:
    """Return the element alone: colours of the page, a title and a description, no names that nothing refers to."""
    svg = svg[svg.index("<svg") :].strip()
    for placeholder, variable in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    told = "; ".join(_told(line) for line in lines if not line.faint)
    return f'{head} role="img" aria-label="{text(title)}"><title>{text(title)}</title><desc>{text(told)}</desc>{rest}'


def _told(line: Line) -> str:
    finite = [v for v in line.y if v is not None and math.isfinite(v)]
    values = f"from {finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no values"
    return f"{line.label or 'values'}: {values}"
