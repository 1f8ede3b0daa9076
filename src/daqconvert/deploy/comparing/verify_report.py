"""What `verify` returns: two models side by side, layer by layer, as values, a table, a picture and JSON.

Units are those of `export_report`: shares are 0..1, SQNR is in decibels and infinite where nothing differs,
differences of codes are in levels.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.deploy.comparing.export_report import db_text, plain
from daqconvert.errors import ExportError, nearest
from daqconvert.files import replacing
from daqconvert.report.plots import FORMATS, Curve, draw_depth
from daqconvert.spec.text_table import text_table

LOW = 30.0
"""Where the models have no codes to compare, a report names the first layer whose SQNR is below this, in decibels."""


@dataclass(frozen=True)
class LayerComparison:
    """One layer in two models.

    Attributes:
        name: Dotted name.
        sqnr: SQNR of its output, or None where only its codes could be read in both models.
        largest_difference: Largest absolute difference of its output, or None where only codes could be read.
        codes: Number of input codes compared; 0 unless both models quantize the layer's input.
        differing: Number of codes that differ.
        largest: Largest difference of two codes, in levels.
    """

    name: str
    sqnr: float | None
    largest_difference: float | None
    codes: int = 0
    differing: int = 0
    largest: int = 0

    @property
    def identical(self) -> bool:
        """Whether everything that could be read in both models is the same."""
        return not self.differing and self.largest_difference in (0.0, None)

    @property
    def code_agreement(self) -> float | None:
        """Share of equal codes; None where there are none to compare."""
        return 1 - self.differing / self.codes if self.codes else None


@dataclass(frozen=True)
class VerifyReport:
    """How well a candidate agrees with a reference.

    Attributes:
        reference: What the reference is, in words.
        candidate: What the candidate is, in words.
        samples: Number of samples compared.
        agreement: Share of samples with the same top-1 class, or None where no output is of shape `(N, classes)`.
        sqnr: SQNR of the outputs.
        largest_difference: Largest absolute difference of an output.
        layers: The layers that both models have, in the reference's order of execution.
    """

    reference: str
    candidate: str
    samples: int
    agreement: float | None
    sqnr: float
    largest_difference: float
    layers: tuple[LayerComparison, ...]

    @property
    def identical(self) -> bool:
        """Whether every output is the same in every element."""
        return self.largest_difference == 0.0

    @property
    def codes(self) -> int:
        """Number of codes compared, in all layers."""
        return sum(layer.codes for layer in self.layers)

    @property
    def code_agreement(self) -> float | None:
        """Share of equal codes over all layers; None where the models have no codes to compare."""
        return 1 - sum(layer.differing for layer in self.layers) / self.codes if self.codes else None

    @property
    def first_difference(self) -> str | None:
        """Name of the first layer whose input codes differ; None if there is no such layer."""
        return next((layer.name for layer in self.layers if layer.differing), None)

    def first_below(self, sqnr: float) -> str | None:
        """Return the name of the first layer whose output's SQNR is below `sqnr` decibels, or None if none is."""
        return next((row.name for row in self.layers if row.sqnr is not None and not row.sqnr >= sqnr), None)

    def where(self) -> str:
        """Return a sentence on where the models first differ: by codes if both have codes, else by outputs.

        Example:
            >>> row = LayerComparison("conv", 40.0, 0.1, codes=100, differing=2, largest=1)
            >>> VerifyReport("a", "b", 1, None, 30.0, 0.1, (row,)).where()
            'codes first differ at conv: 2 of 100, by up to 1 level'
        """
        rows = {layer.name: layer for layer in self.layers}
        if self.first_difference is not None:
            row = rows[self.first_difference]
            levels = "level" if row.largest == 1 else "levels"
            which = f"{row.name or '(root)'}: {row.differing} of {row.codes}, by up to {row.largest} {levels}"
            return f"codes first differ at {which}"
        if self.codes:
            return "no code differs" if self.identical else "no code differs, the output does: rounding after the last"
        first = next((row for row in self.layers if not row.identical), None)
        if first is None:
            return "identical" if self.identical else "only the output differs"
        low = self.first_below(LOW)
        more = "" if low is None else f"; below {LOW:g} dB first {low or '(root)'}, {db_text(rows[low].sqnr or 0.0)}"
        shown = "" if first.sqnr is None else f", {db_text(first.sqnr)}"
        return f"outputs first differ at {first.name or '(root)'}{shown}{more}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON; infinite and unknown numbers are null."""
        rows = [{**dataclasses.asdict(row), "identical": row.identical} for row in self.layers]
        found = {"code_agreement": self.code_agreement, "first_difference": self.first_difference}
        return plain({**dataclasses.asdict(self), **found, "identical": self.identical, "layers": rows})

    def __str__(self) -> str:
        """Return a plain-text table: a row for each layer, then where the models differ and by how much."""
        rows = [("layer", "SQNR", "largest difference", "codes", "differing", "by levels")]
        for row in self.layers:
            codes = (str(row.codes), str(row.differing), str(row.largest)) if row.codes else ("-", "-", "-")
            sqnr = "-" if row.sqnr is None else db_text(row.sqnr)
            largest = "-" if row.largest_difference is None else f"{row.largest_difference:.3g}"
            rows.append((row.name or "(root)", sqnr, largest, *codes))
        lines = [f"{self.candidate} against {self.reference}, {self.samples} samples"]
        lines += text_table(rows, right=range(1, 6)) if self.layers else []
        lines.append(self.where())
        if self.code_agreement is not None:
            lines.append(f"codes: the same for {share_text(self.code_agreement)} of {self.codes:,}")
        if self.agreement is not None:
            lines.append(f"top-1: the same for {self.agreement:.2%}")
        lines.append(f"output: largest difference {self.largest_difference:.3g}, SQNR {db_text(self.sqnr)}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the SQNR of every layer's output by depth.

        Args:
            path: File to write, whose name ends in `.png`, `.svg` or `.pdf`; an existing file is replaced.

        Raises:
            ExportError: If the picture cannot be written, or matplotlib is not installed.
        """
        plot_reports([self], path)


def plot_reports(reports: Sequence[VerifyReport], path: str | Path, title: str = "") -> None:
    """Draw several comparisons into one picture, a line each; `path` ends in `.png`, `.svg` or `.pdf`.

    Raises:
        ExportError: If the picture cannot be written, no report has a layer, or matplotlib is not installed.
    """
    place = Path(path)
    kind = place.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        names = [f".{name}" for name in FORMATS]
        raise ExportError(f"plot: {place}: expected a name that ends in {', '.join(names)}.{nearest(kind, FORMATS)}")
    curves = [_curve(report) for report in reports]
    if not any(curve.values for curve in curves):
        raise ExportError(
            "plot: no layer's output could be read in both models, so there is no SQNR by depth to draw."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ExportError("plot needs matplotlib, which is not installed. Run: pip install 'daqconvert[plot]'")
    with replacing(place, ExportError, "Make room, or choose another place.") as temporary:
        draw_depth(temporary, kind, curves, title)


def _curve(report: VerifyReport) -> Curve:
    words = [f"{report.candidate} against {report.reference}"]
    if report.agreement is not None:
        words.append(f"top-1 the same for {report.agreement:.1%}")
    if report.code_agreement is not None:
        words.append(f"codes for {share_text(report.code_agreement)}")
    values = {row.name or "(root)": row.sqnr for row in report.layers if row.sqnr is not None}
    first = report.first_difference
    return Curve(
        "\n".join([words[0], ", ".join(words[1:])]).strip(), values, None if first is None else first or "(root)"
    )


def share_text(value: float) -> str:
    """Return a share of 0 to 1 in percent; a share below 1 is never shown as 100 %.

    Example:
        >>> share_text(0.5), share_text(0.999999), share_text(1.0)
        ('50.00%', 'more than 99.99%', '100.00%')
    """
    text = f"{value:.2%}"
    return "more than 99.99%" if value < 1.0 and text == "100.00%" else text
