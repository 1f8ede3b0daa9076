"""Pictures by matplotlib: the SQNR of layers by depth, as a file, and curves over the epochs, as SVG for a page.

Only this file imports matplotlib, and only when something is drawn: it belongs to the extra `plot`.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.report.html import text
from daqconvert.spec import OUTPUT_QUANTIZER

FORMATS = ("png", "svg", "pdf")
COLORS = ("#1f5fa8", "#c8541b", "#2f8f4e", "#7a4fa3", "#666666")
MARKS = ("o", "s", "^", "D", "v")
MOST_NAMES = 60  # more names than this would be too small to read: then only every second or third is written
DPI = 120
TOP = 0.08  # the band for identical layers, as a share of the height of the rest
KNEE, SQUEEZE = 60.0, 0.25  # above KNEE decibels there is little but float rounding: drawn at a quarter of the height


@dataclass(frozen=True)
class Curve:
    """The SQNR of layers in one comparison.

    Attributes:
        label: Its name in the legend.
        values: Decibels by layer, in order; infinite where nothing differs.
        first: The first layer whose codes differ, if any.
    """

    label: str
    values: Mapping[str, float]
    first: str | None = None


def draw_depth(path: Path, kind: str, curves: Sequence[Curve], title: str = "") -> None:
    """Write a picture of decibels by layer; layers that are identical stand on a line of their own at the top.

    `kind` is one of `FORMATS`; there is at least one curve, with a layer in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = sorted(curves, key=lambda curve: -len(curve.values))  # the longest curve decides the order of layers
    names = list(dict.fromkeys(name for curve in longest for name in curve.values))
    width = min(max(6.5, 1.8 + 0.19 * len(names)), 15.0)
    letters = max(len(_shown(name)) for name in names)
    figure = Figure(figsize=(width, 4.0 + 0.28 * len(curves) + 0.06 * letters), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    low, high = _range(curves)
    bottom, height = _squeezed(low), _squeezed(high) - _squeezed(low)
    top = _stretched(bottom + (1 + TOP) * height)
    panel.set_yscale("function", functions=(_squeezed, _stretched))
    for number, curve in enumerate(curves):
        _line(panel, curve, number, {name: i for i, name in enumerate(names)}, top)
    panel.axhline(top, color="#bbbbbb", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    panel.set_ylim(low, _stretched(bottom + (1 + 1.6 * TOP) * height))
    panel.set_xlim(-0.6, len(names) - 0.4)
    _axes(panel, names, [*_ticks(low, high), top])
    if title:
        panel.set_title(textwrap.fill(title, int(9 * width)), fontsize=11, loc="left")
    figure.legend(loc="outside lower left", fontsize=8, frameon=False, ncols=2 if len(curves) > 1 and width > 9 else 1)
    figure.savefig(path, format=kind, dpi=DPI)


def _range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the lowest and the highest decibels of the axis, which are multiples of ten and include 0."""
    finite = [value for curve in curves for value in curve.values.values() if math.isfinite(value)]
    low = 10.0 * math.floor(min([0.0, *finite]) / 10.0)
    return low, 10.0 * math.ceil(max([10.0, *finite]) / 10.0)


def _squeezed(decibels: Any) -> Any:
    """Return the height at which decibels are drawn; both are numbers or arrays."""
    over = (decibels - KNEE) * (decibels > KNEE)
    return decibels - (1 - SQUEEZE) * over


def _stretched(height: Any) -> Any:
    """Return the decibels that are drawn at a height: the inverse of `_squeezed`."""
    over = (height - KNEE) * (height > KNEE)
    return height + (1 / SQUEEZE - 1) * over


def _ticks(low: float, high: float) -> list[float]:
    below = [low + 10.0 * i for i in range(int(min(high, KNEE) - low) // 10 + 1)]
    return below + [KNEE + 40.0 * i for i in range(1, int(max(high - KNEE, 0.0)) // 40 + 1)]


def _line(panel: Any, curve: Curve, number: int, places: Mapping[str, int], top: float) -> None:
    """Draw one curve; a layer without signal, or with noise that is not finite, leaves a gap."""
    values = dict(sorted(curve.values.items(), key=lambda item: places[item[0]]))
    x = [places[name] for name in values]
    y = [top if value == math.inf else value if math.isfinite(value) else math.nan for value in values.values()]
    color, mark = COLORS[number % len(COLORS)], MARKS[number % len(MARKS)]
    label = curve.label
    if curve.first is not None:
        label += f"\ncodes first differ at {curve.first}" + " (ringed)" * (curve.first in curve.values)
    panel.plot(  # later curves are broader and lie below the others: where two coincide, both are seen
        x, y, color=color, marker=mark, markersize=4 + 1.3 * number, linewidth=1.2 + 0.7 * number, label=label,
        zorder=12 - number,
    )  # fmt: skip
    if curve.first is not None and curve.first in curve.values:
        at = list(values).index(curve.first)
        panel.plot(
            x[at : at + 1], y[at : at + 1], marker="o", markersize=13 + 1.3 * number, markerfacecolor="none",
            markeredgecolor=color, linestyle="none", zorder=20,
        )  # fmt: skip


def _shown(name: str) -> str:
    """Return the name of a layer for people; an output quantizer is shown as its module's name and `(output)`."""
    return name.removesuffix(f".{OUTPUT_QUANTIZER}") + " (output)" * name.endswith(f".{OUTPUT_QUANTIZER}")


def _axes(panel: Any, names: Sequence[str], ticks: Sequence[float]) -> None:
    """Label layers and decibels; the last tick is the line for layers that are identical."""
    step = -(-len(names) // MOST_NAMES)
    shown = range(0, len(names), step)
    size = 8 if len(shown) <= 30 else 6.5
    panel.set_xticks(list(shown), [_shown(names[i]) for i in shown], rotation=90, fontsize=size)
    panel.set_ylabel("SQNR of the layer's output, dB")
    panel.set_xlabel("layers in order of execution" + (f", one name in {step} shown" if step > 1 else ""))
    panel.set_yticks(list(ticks), [*(f"{tick:g}" for tick in ticks[:-1]), "identical"])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


# Curves over the epochs.

# matplotlib knows no CSS variables: it draws in these colours, which `_inline` replaces by variables of the page.
PLACEHOLDERS = {
    "#010203": "var(--ink)", "#040506": "var(--soft)", "#070809": "var(--line)", "#0a0b0c": "var(--c1)",
    "#0d0e0f": "var(--c2)", "#101112": "var(--c3)", "#131415": "var(--c4)",
}  # fmt: skip
INK, SOFT, FAINT, *LINE_COLORS = PLACEHOLDERS
MOST_MARKS = 40  # more points than this need no marks
OUTLIERS = 12  # one value in so many, at each end of a line in the background, may lie outside of the axes


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: Its name in the legend; `""` if it has none there.
        x: Epochs.
        y: Values; None and values that are not finite leave a gap.
        color: Index of its colour, 0 to 3.
        faint: Whether it stays in the background.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: int = 0
    faint: bool = False


def curve(title: str, lines: Sequence[Line], *, percent: bool = False, log: bool = False, mark: Any = None) -> str:
    """Return a chart as an `<svg>` element; the same values give the same text.

    With `percent` the values are shares. With `log` the axis is logarithmic, and values of 0 and less leave a gap.
    `mark` is `(x, y)` of a point to ring.

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
        panel = figure.subplots(gridspec_kw={"left": 0.14, "right": 0.985, "bottom": 0.165, "top": 0.9})
        for line in lines:
            _draw(panel, line, log)
        if mark is not None:
            panel.plot(*([v] for v in mark), "o", ms=11, mfc="none", mec=INK, mew=1.2)
        if log:
            panel.set_yscale("log")
        if percent:
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _fit(panel, lines, log)
        _dress(panel, title, any(line.label for line in lines))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), title, lines)


def _fit(panel: Any, lines: Sequence[Line], log: bool) -> None:
    """Fit the axes to the values: whole epochs, and no room for the few outliers of a line in the background."""
    epochs = [x for line in lines for x in line.x]
    if epochs:
        low, high = math.floor(min(epochs)), math.ceil(max(epochs))
        room = 0.5 if low == high else 0.02 * (high - low)
        panel.set_xlim(low - room, high + room)
    if log:
        return
    shown: list[float] = []
    for line in lines:
        known = sorted(v for v in line.y if v is not None and math.isfinite(v))
        cut = len(known) // OUTLIERS if line.faint else 0
        shown += known[cut : len(known) - cut]
    if shown:
        room = 0.06 * (max(shown) - min(shown)) or 0.05 * abs(max(shown)) or 0.05
        panel.set_ylim(min(shown) - room, max(shown) + room)


def _draw(panel: Any, line: Line, log: bool) -> None:
    y = [v if v is not None and math.isfinite(v) and (v > 0 or not log) else math.nan for v in line.y]
    marks = {} if line.faint or len(y) > MOST_MARKS else {"marker": "o", "markersize": 3.5}
    width, alpha = (0.9, 0.35) if line.faint else (1.8, 1.0)
    panel.plot(
        line.x, y, color=LINE_COLORS[line.color], linewidth=width, alpha=alpha, label=line.label or "_", **marks
    )


def _dress(panel: Any, title: str, legend: bool) -> None:
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    panel.set_xlabel("epoch", color=SOFT)
    panel.tick_params(which="both", colors=SOFT, length=3)
    panel.grid(color=FAINT, linewidth=0.8)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if legend:
        panel.legend(frameon=False, fontsize=9, labelcolor=INK, loc="best")


def _inline(svg: str, title: str, lines: Sequence[Line]) -> str:
    """Return matplotlib's SVG as an element for a page: with the page's colours, a title and a description.

    Ids that nothing refers to are left out, because ids of several charts on one page could be the same.
    """
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
    described = "; ".join(_described(line) for line in lines if not line.faint)
    named = f'role="img" aria-label="{text(title)}"><title>{text(title)}</title>'
    return f"{head} {named}<desc>{text(described)}</desc>{rest}"


def _described(line: Line) -> str:
    finite = [v for v in line.y if v is not None and math.isfinite(v)]
    values = f"from {finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no values"
    return f"{line.label or 'values'}: {values}"
