"""Layers on the page of a run: a table of their bits, and a card for each, which shows its weights and its bounds.

The charts on a card are SVG written by hand: a page may have hundreds of them, so each has to be small and quick to
draw. Their colours are the variables of the page's style, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from daqconvert.report.html import folded_table, number, percent, text
from daqconvert.report.tables import short_number

OPEN = 40  # layers that are shown at first; the others are folded away
MOST = 400  # cards on a page; all layers are in the table
WIDTH, HEIGHT = 110, 56  # of a chart
BARS = 64  # more levels than this are drawn several to a bar
POINTS = 80  # more epochs than this are thinned out
Moments = Sequence[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name: Dotted name.
        kind: Its type.
        params: Number of its parameters, or None where it is unknown.
        bits: Bits of weight and input, as they are now; None for float.
        moments: `(epoch, measure)`; a measure has `weight` and `input` (lower and upper bound), `weight_spread` and
            `scale` (least, mean and largest output scale), each None where the layer has none.
        levels: Number of weights on each level now; None if the weight has no levels.
        start: Number of weights on each level before the first step, or None.
        unit: Unit of the weight's bounds: `"std"` where the weight is normalized.
        oscillating: Share of its weights that oscillate; None if it was not measured.
        frozen: Share of its weights that is frozen; None if it was not measured.
        rule: What decided its bits.
    """

    name: str
    kind: str = ""
    params: int | None = None
    bits: tuple[int | None, int | None] = (None, None)
    moments: Moments = ()
    levels: Sequence[int] | None = None
    start: Sequence[int] | None = None
    unit: str = ""
    oscillating: float | None = None
    frozen: float | None = None
    rule: str = ""


def layer_table(layers: Sequence[LayerReport]) -> str:
    """Return the table: a row for each layer, bits as numbers and bars."""
    columns = ["layer", "type", "weight bits", "input bits", "parameters", "on its fullest level", "output scale"]
    numbers = ["parameters", "on its fullest level", "output scale"]
    oscillating = any(layer.oscillating is not None for layer in layers)
    if oscillating:
        columns.insert(6, "oscillating")
        numbers.append("oscillating")
    rows = []
    for layer in layers:
        cells = [text(layer.name), text(layer.kind), _bits(layer.bits[0], "--c1"), _bits(layer.bits[1], "--c2")]
        cells += [short_number(layer.params), _fullest(layer.levels)]
        if oscillating:
            cells.append(percent(layer.oscillating))
        rows.append([*cells, _scale(layer.moments)])
    return folded_table(columns, rows, "more layers", shown=OPEN, numbers=numbers)


def layer_cards(layers: Sequence[LayerReport]) -> str:
    """Return a card for each layer: its weights over their levels, the bounds of weight and input over the epochs."""
    cards = [_card(layer) for layer in layers[:MOST]]
    note = (
        '<p class="soft">Left: the share of weights on each level, from the lowest to the highest; bars are now, the '
        "orange line is before training. Middle and right: lower and upper bound of weight and input, epoch by epoch; "
        "the grey line is 0.</p>"
    )
    found = f'{note}<div class="layers">{"".join(cards[:OPEN])}</div>'
    if cards[OPEN:]:
        rest = f'<div class="layers">{"".join(cards[OPEN:])}</div>'
        found += f"<details><summary>{len(cards) - OPEN} more layers</summary>{rest}</details>"
    if len(layers) > MOST:
        found += f'<p class="soft">{len(layers) - MOST} more layers have no card here; see snapshots.jsonl.</p>'
    return found


def _bits(bits: int | None, color: str) -> str:
    """Return bits as a number and a bar, or the word float."""
    if bits is None:
        return '<span class="bits soft">float</span>'
    return (
        f'<span class="bits"><i>{bits}</i><span class="bar" style="width:{0.55 * bits:.2f}em;background:var({color})">'
        "</span></span>"
    )


def _fullest(levels: Sequence[int] | None) -> str:
    return percent(max(levels) / (sum(levels) or 1), 1) if levels else "-"


def _scale(moments: Moments) -> str:
    found = moments[-1][1].get("scale") if moments else None
    if not found:
        return "-"
    least, mean, largest = found
    return number(mean, 3) if least == largest else f"{number(mean, 3)} ({number(least, 2)} to {number(largest, 2)})"


def _card(layer: LayerReport) -> str:
    w, a = ("float" if bits is None else f"{bits} bit{'s' * (bits > 1)}" for bits in layer.bits)
    words = [f"weight {w}, input {a}"]
    if layer.oscillating:
        words.append(f"{percent(layer.oscillating)} oscillating")
    if layer.frozen:
        words.append(f"{percent(layer.frozen)} frozen")
    panels = [_levels(layer), _bounds(layer, "weight", "--c1"), _bounds(layer, "input", "--c2")]
    return (
        f'<div class="layer"><h3>{text(layer.name)}</h3><p class="soft">{text(", ".join(words))}</p>'
        f'<div class="row">{"".join(f"<div>{panel}</div>" for panel in panels)}</div></div>\n'
    )


def _levels(layer: LayerReport) -> str:
    if not layer.levels:
        return "<small>weight without levels</small>"
    label = f"{layer.name}: weights on {len(layer.levels)} levels, at most {_fullest(layer.levels)} on one"
    return (
        histogram(layer.levels, layer.start, label)
        + f"<small>{len(layer.levels)} levels, up to {_fullest(layer.levels)}</small>"
    )


def _bounds(layer: LayerReport, key: str, color: str) -> str:
    found = [(epoch, measure.get(key)) for epoch, measure in layer.moments]
    known = [(epoch, bounds) for epoch, bounds in found if bounds]
    if not known:
        return f"<small>{key} in float</small>"
    low, high = known[-1][1]
    unit = f" {layer.unit}" if layer.unit and key == "weight" else ""
    told = f"{number(low, 3)} to {number(high, 3)}{unit}"
    label = f"{layer.name}: {key} bounds from epoch {known[0][0]} to {known[-1][0]}, now {told}"
    series = [(color, [bounds[i] if bounds else None for _, bounds in found]) for i in (0, 1)]
    return lines(series, label) + f"<small>{key} {told}</small>"


def histogram(now: Sequence[int], start: Sequence[int] | None, label: str) -> str:
    """Return bars of the share of weights on each level, and an outline of the shares at the start.

    There is no outline without a `start`, or where the number of levels has changed. The label is for readers who
    cannot see the chart.

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
    """Return lines over the epochs on one scale that includes 0; values that are missing or not finite leave a gap.

    A line has a colour (a variable of the page's style, as `--c1`) and values. The label is for readers who cannot see
    the chart.

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
