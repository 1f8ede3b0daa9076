"""Pictures for people: the SQNR of layers by depth. The one owner of matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.spec import OUTPUT_QUANTIZER

FORMATS = ("png", "svg", "pdf")
COLORS = ("#1f5fa8", "#c8541b", "#2f8f4e", "#7a4fa3", "#666666")
MARKS = ("o", "s", "^", "D", "v")
MOST_NAMES = 60  # more names than this would be too small to read: every second or third is written then
DPI = 120
TOP = 0.08  # the band for identical layers, as a share of the height of the rest
KNEE, SQUEEZE = 60.0, 0.25  # above this many decibels there is little but float rounding: drawn at a quarter's height


@dataclass(frozen=True)
class Curve:
    """One line of the picture.

    Attributes:
        label: For the legend.
        values: Decibels by layer, in order; infinite where nothing differs.
        first: The first layer whose codes differ, if any.
    """

    label: str
    values: Mapping[str, float]
    first: str | None = None


def draw_depth(path: Path, kind: str, curves: Sequence[Curve], title: str = "") -> None:
    """Write a picture of decibels by layer; what is identical stands on a line of its own at the top.

    Args:
        path: The file.
        kind: Of `FORMATS`.
        curves: At least one, with a layer.
        title: Above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    longest = sorted(curves, key=lambda curve: -len(curve.values))  # its order is everybody's
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
    """Lowest and highest decibels of the axis, in steps of ten, 0 among them."""
    finite = [value for curve in curves for value in curve.values.values() if math.isfinite(value)]
    low = 10.0 * math.floor(min([0.0, *finite]) / 10.0)
    return low, 10.0 * math.ceil(max([10.0, *finite]) / 10.0)


def _squeezed(decibels: Any) -> Any:
    """Decibels (a number or an array) to height."""
    over = (decibels - KNEE) * (decibels > KNEE)
    return decibels - (1 - SQUEEZE) * over


def _stretched(height: Any) -> Any:
    """Height to decibels: what undoes `_squeezed`."""
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
    panel.plot(  # the later the broader, and below the others: where two lie on each other, both are seen
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
    """A layer's name; the quantizer of a module's output under that module's."""
    return name.removesuffix(f".{OUTPUT_QUANTIZER}") + " (output)" * name.endswith(f".{OUTPUT_QUANTIZER}")


def _axes(panel: Any, names: Sequence[str], ticks: Sequence[float]) -> None:
    """Name layers and decibels; the last tick is the line of what is identical."""
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
