"""The page of a training run, `report.html`: one file that shows all of it, without a network or a script.

It is made of plain data, so the page of any run can be made again from the files that the run wrote. Curves need
matplotlib (extra `plot`); without it, the table of epochs has their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from daqconvert.report.fits import Fitted, fit_tables
from daqconvert.report.html import facts, number, page, percent, table, text
from daqconvert.report.layer_cards import LayerReport, layer_cards, layer_table
from daqconvert.report.plots import Line, curve

OPEN_EPOCHS = 20  # if there are more epochs than this, their table is folded away
MOST_WARNINGS = 100
MOST_STEPS = 400  # points of the loss by step
Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrainingReport:
    """What the page shows.

    Attributes:
        title: Heading of the page.
        subtitle: Line below the heading.
        finished: Whether the run is at its end.
        epochs: Epochs of the whole run.
        rows: The history, one row per epoch.
        best_epoch: Epoch of the best row; None before there is one.
        layers: The quantized layers, in order.
        fitted: Layers or blocks that were fitted before training, by field of the recipe.
        steps: Loss by step: `(epochs done, loss)`.
        warnings: Dicts with `epoch`, `layer`, `kind`, `text`.
        tables: Recipe, sizes and versions: heading -> name -> value.
        commands: Commands to type next: heading -> command.
    """

    title: str
    subtitle: str = ""
    finished: bool = False
    epochs: int = 0
    rows: Sequence[Row] = ()
    best_epoch: int | None = None
    layers: Sequence[LayerReport] = ()
    fitted: Mapping[str, Sequence[Fitted]] = field(default_factory=dict)
    steps: Sequence[tuple[float, float]] = ()
    warnings: Sequence[Mapping[str, Any]] = ()
    tables: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)


def training_page(data: TrainingReport) -> str:
    """Return the page as HTML.

    Example:
        >>> "no epoch is done yet" in training_page(TrainingReport("ResNet, W2A2", epochs=3))
        True
    """
    state = "finished" if data.finished else f"epoch {len(data.rows)} of {data.epochs}"
    parts = [
        f'<h1>{text(data.title)} <span class="chip{" done" if data.finished else ""}">{state}</span></h1>',
        f'<p class="soft">{text(data.subtitle)}</p>' if data.subtitle else "",
        NO_RESULT,
        _figures(data),
        _section("Warnings", _warnings(data.warnings)) if data.warnings else "",
        _section("Curves", _curves(data)),
        _section("Layers", layer_table(data.layers)) if data.layers else "",
        _section("Weights and bounds", layer_cards(data.layers)) if data.layers else "",
        _section("Fitted before training", fit_tables(data.fitted)) if data.fitted else "",
        _section("Epochs", _epochs(data)),
        _section("The run", facts(data.tables)) if data.tables else "",
        *(f"<h3>{text(name)}</h3><pre>{text(command)}</pre>" for name, command in data.commands.items()),
    ]
    return page(data.title, "\n".join(part for part in parts if part))


@dataclass(frozen=True)
class Deployment:
    """What became of a run: the answer that a reader looks for first.

    Attributes:
        cards: The few numbers that matter, each as `(value, what it is)`.
        columns: Headings of the table.
        rows: A row for each model: float, trained, frozen, exported.
        notes: Sentences below the table.
    """

    cards: Sequence[tuple[str, str]]
    columns: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    notes: Sequence[str] = ()


def with_result(html: str, result: Deployment) -> str:
    """Return the page of a run with its result above everything else; a page has one, that of the last call.

    Example:
        >>> page_of_run = training_page(TrainingReport("ResNet, W2A2", finished=True))
        >>> result = Deployment([("91.2 %", "top-1")], ["model", "top-1"], [["float", "92 %"]])
        >>> again = with_result(with_result(page_of_run, result), result)
        >>> again.count("91.2 %"), again.count("<h2>Result</h2>")
        (1, 1)
    """
    rows = [["-" if cell is None else text(cell) for cell in row] for row in result.rows]
    notes = "".join(f'<p class="soft">{text(note)}</p>' for note in result.notes)
    body = f"{_cards(result.cards)}{table(result.columns, rows, numbers=result.columns[1:])}{notes}"
    start, end = html.index(RESULT), html.index(RESULT_END) + len(RESULT_END)
    return f"{html[:start]}{RESULT}<h2>Result</h2>\n{body}{RESULT_END}{html[end:]}"


RESULT, RESULT_END = '<section class="result">', "</section><!-- result -->"
NO_RESULT = RESULT + RESULT_END


def _best(data: TrainingReport) -> Row | None:
    return next((row for row in data.rows if row["epoch"] == data.best_epoch), None)


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{text(heading)}</h2>\n{body}</section>"


def _figures(data: TrainingReport) -> str:
    """Return the few numbers that a reader looks for first, as cards."""
    if not data.rows:
        return '<p class="soft">no epoch is done yet</p>'
    last, best = data.rows[-1], _best(data)
    cards: list[tuple[str, str]] = []
    if best is not None and best.get("val_top1") is not None:
        cards.append((percent(best["val_top1"]), f"best top-1 (epoch {best['epoch']})"))
        cards.append((percent(last.get("val_top1")), "last top-1"))
    cards.append((number(last.get("train_loss")), "last training loss"))
    cards.append((number(last.get("images_per_second")), "images per second"))
    cards.append((_time(sum(row.get("seconds") or 0.0 for row in data.rows)), "training time"))
    if last.get("oscillating") is not None:
        cards.append((percent(last["oscillating"]), "of the weights oscillate"))
    if last.get("frozen"):
        cards.append((percent(last["frozen"]), "of the weights are frozen"))
    cards.append((str(len(data.warnings)), "warning" if len(data.warnings) == 1 else "warnings"))
    return _cards(cards)


def _cards(cards: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<div class="card"><b>{text(a)}</b><span>{text(b)}</span></div>' for a, b in cards)
    return f'<div class="cards">{shown}</div>'


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> str:
    shown = "".join(
        f"<li><b>epoch {text(w['epoch'])}, {text(w['kind'])}</b> {text(w['text'])}</li>"
        for w in warnings[:MOST_WARNINGS]
    )
    more = len(warnings) - MOST_WARNINGS
    return f'<ul class="warnings">{shown}</ul>' + (f"<p>and {more} more in warnings.jsonl</p>" if more > 0 else "")


def _curves(data: TrainingReport) -> str:
    if not data.rows:
        return '<p class="soft">nothing to draw yet</p>'
    try:
        charts = [chart for chart in (draw(data) for draw in _CHARTS) if chart]
    except ImportError:
        return (
            "<p>Curves are drawn by matplotlib, which is not installed: <code>pip install 'daqconvert[plot]'</code>. "
            "Their numbers are in the table of epochs.</p>"
        )
    return f'<div class="charts">{"".join(f"<figure>{chart}</figure>" for chart in charts)}</div>'


def _loss(data: TrainingReport) -> str:
    every = max(1, -(-len(data.steps) // MOST_STEPS))
    steps = data.steps[::every]
    lines = [Line("", [s[0] for s in steps], [s[1] for s in steps], 0, faint=True)] if steps else []
    lines.append(Line("training", _column(data.rows, "epoch"), _column(data.rows, "train_loss"), 0))
    return curve("Loss", lines + _lines(data.rows, ("validation", "val_loss", 1)))


def _top1(data: TrainingReport) -> str:
    lines = _lines(data.rows, ("training", "train_top1", 0), ("validation", "val_top1", 1), zeros=False)
    best = _best(data)
    mark = None if best is None or best.get("val_top1") is None else (best["epoch"], best["val_top1"])
    return curve("Top-1 accuracy", lines, percent=True, mark=mark) if lines else ""


def _rates(data: TrainingReport) -> str:
    lines = _lines(data.rows, ("weights", "lr", 0), ("quantizers", "quantizer_lr", 1), zeros=False)
    return curve("Learning rate at the end of the epoch", lines, log=True) if lines else ""


def _oscillation(data: TrainingReport) -> str:
    lines = _lines(data.rows, ("oscillating", "oscillating", 2), ("frozen", "frozen", 3))
    return curve("Share of weights that oscillate", lines, percent=True) if lines else ""


_CHARTS: tuple[Callable[[TrainingReport], str], ...] = (_loss, _top1, _rates, _oscillation)


def _lines(rows: Sequence[Row], *columns: tuple[str, str, int], zeros: bool = True) -> list[Line]:
    """Return a line for each column `(label, key, colour)` that has a value; unless `zeros`, one other than 0."""
    x = _column(rows, "epoch")
    found = [(label, _column(rows, key), color) for label, key, color in columns]
    return [Line(label, x, y, color) for label, y, color in found if any(v if not zeros else v is not None for v in y)]


def _column(rows: Sequence[Row], key: str) -> list[Any]:
    return [row.get(key) for row in rows]


def _epochs(data: TrainingReport) -> str:
    columns = list(dict.fromkeys(key for row in data.rows for key in row))
    best = _best(data)
    marked = None if best is None else list(data.rows).index(best)
    rows = [[text(_cell(key, row.get(key))) for key in columns] for row in data.rows]
    found = table(
        [c.replace("_", " ") for c in columns], rows, numbers=[c.replace("_", " ") for c in columns], marked=marked
    )
    if len(data.rows) <= OPEN_EPOCHS:
        return found
    return f"<details><summary>{len(data.rows)} epochs, the best in bold</summary>{found}</details>"


def _cell(key: str, value: object) -> str:
    if isinstance(value, float) and (key.endswith("top1") or key in ("oscillating", "frozen")):
        return percent(value)
    return number(value)
