"""What `export` and `verify` found: frozen dataclasses, a plain-text table each, `to_dict()` for JSON.

Units: shares are 0..1, SQNR is `10 log10(sum(reference^2) / sum((reference - candidate)^2))` in decibels, infinite (in
JSON: null) where nothing differs; differences of codes are in levels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CODE_SHARE = 1e-4  # largest share of codes that may differ for the same input codes, by one level
CLASS_SHARE = 0.999  # smallest share of equal classes, one sample apart
SAME_CODES_SQNR = 60.0  # smallest SQNR of the output for the same codes: float32 rounding alone leaves far more


@dataclass(frozen=True)
class LayerAgreement:
    """How well the input codes of one layer agree between the frozen model and its file.

    Attributes:
        name: Dotted name of the layer.
        elements: Codes compared.
        differing: Codes that differ, each model on its own path from the input.
        largest: Their largest difference, in levels.
        differing_same: Codes that differ where every layer before was given the same codes.
        largest_same: Their largest difference, in levels.
    """

    name: str
    elements: int
    differing: int
    largest: int
    differing_same: int
    largest_same: int

    @property
    def share(self) -> float:
        """Share of codes that differ end to end."""
        return self.differing / max(self.elements, 1)

    @property
    def share_same(self) -> float:
        """Share of codes that differ for the same input codes."""
        return self.differing_same / max(self.elements, 1)

    @property
    def agrees(self) -> bool:
        """Whether at most 1 code of 10,000 (and one at all) differs for the same input codes, by one level."""
        return self.largest_same <= 1 and self.differing_same <= max(1.0, CODE_SHARE * self.elements)


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote, and how well ONNX Runtime agrees with the model it was made from.

    Attributes:
        path: The file.
        file_bytes: Its size.
        layers: Agreement of the input codes, per layer that has codes, in order of execution.
        samples: Number of samples compared.
        largest_difference: Largest absolute difference of an output.
        sqnr: SQNR of the outputs.
        sqnr_same_codes: The same where every layer was given the same codes: what float rounding alone leaves.
        class_agreement: Share of samples with the same class, or None where the output is no `(N, classes)`.
        notes: What else to know.
    """

    path: str
    file_bytes: int
    layers: tuple[LayerAgreement, ...]
    samples: int
    largest_difference: float
    sqnr: float
    sqnr_same_codes: float
    class_agreement: float | None
    notes: tuple[str, ...] = ()

    @property
    def classes_differing(self) -> int:
        """Number of samples with another class."""
        return 0 if self.class_agreement is None else round((1 - self.class_agreement) * self.samples)

    @property
    def agrees(self) -> bool:
        """Whether the file computes what the model computes: codes, outputs for the same codes, classes."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return why it does not agree, one sentence each; empty where it does."""
        found = [
            f"{layer.name or '(root)'}: {layer.differing_same} of {layer.elements} codes differ for the same input "
            f"codes, by up to {layer.largest_same} levels (allowed: 1 of 10,000, by 1)"
            for layer in self.layers
            if not layer.agrees
        ]
        if not self.sqnr_same_codes >= SAME_CODES_SQNR:
            found.append(f"for the same codes the output's SQNR is {_db(self.sqnr_same_codes)}")
        if self.classes_differing > max(1.0, (1 - CLASS_SHARE) * self.samples):
            why = "" if found else "; layer by layer the codes agree, so the network amplifies float32 rounding"
            found.append(f"the class differs for {self.classes_differing} of {self.samples} samples{why}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        rows = [{**dataclasses.asdict(row), "agrees": row.agrees} for row in self.layers]
        return _plain({**dataclasses.asdict(self), "layers": rows, "agrees": self.agrees})

    def __str__(self) -> str:
        """Return a plain-text table: one row per layer whose codes differ anywhere, and the totals."""
        lines = [f"{self.path}: {self.file_bytes:,} bytes"]
        different = [layer for layer in self.layers if layer.differing or layer.differing_same]
        if different:
            rows = [("layer", "codes", "differing", "by levels", "for the same input codes", "by levels")]
            for row in different:
                own, same = f"{row.differing} ({row.share:.2g})", f"{row.differing_same} ({row.share_same:.2g})"
                cells = (own, str(row.largest), same, str(row.largest_same))
                rows.append((row.name or "(root)", str(row.elements), *cells))
            lines += text_table(rows)
        if self.layers:
            lines.append(f"codes: identical in {len(self.layers) - len(different)} of {len(self.layers)} layers")
        lines.append(f"output: largest difference {self.largest_difference:.3g}, SQNR {_db(self.sqnr)}")
        if self.class_agreement is not None:
            lines.append(f"class: the same for {self.class_agreement:.2%} of {self.samples} samples")
        verdict = "agrees" if self.agrees else "DOES NOT AGREE: " + "; ".join(self.problems())
        return "\n".join([*lines, *self.notes, f"ONNX Runtime, {self.samples} samples: {verdict}"])


@dataclass(frozen=True)
class LayerComparison:
    """One layer in two models.

    Attributes:
        name: Dotted name of the layer.
        sqnr: SQNR of its output.
        largest_difference: Largest absolute difference of its output.
        codes: Input codes compared; 0 where one of the models has none.
        differing: Input codes that differ.
        largest: Their largest difference, in levels.
    """

    name: str
    sqnr: float
    largest_difference: float
    codes: int = 0
    differing: int = 0
    largest: int = 0


@dataclass(frozen=True)
class VerifyReport:
    """How well a candidate agrees with a reference.

    Attributes:
        reference: What the reference is, in words.
        candidate: What the candidate is.
        samples: Number of samples compared.
        agreement: Share of samples with the same top-1 class, or None where the output is no `(N, classes)`.
        sqnr: SQNR of the outputs.
        largest_difference: Largest absolute difference of an output.
        layers: The layers both have, in the reference's order of execution.
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
    def first_difference(self) -> str | None:
        """Name of the first layer whose input codes differ; None where none does or none has codes in both."""
        return next((layer.name for layer in self.layers if layer.differing), None)

    def first_below(self, sqnr: float) -> str | None:
        """Return the name of the first layer whose output's SQNR is below `sqnr` decibels, or None."""
        return next((layer.name for layer in self.layers if not layer.sqnr >= sqnr), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return _plain({**dataclasses.asdict(self), "first_difference": self.first_difference})

    def __str__(self) -> str:
        """Return a plain-text table: one row per layer, and the outputs."""
        rows = [("layer", "SQNR", "largest difference", "codes", "differing", "by levels")]
        for row in self.layers:
            codes = (str(row.codes), str(row.differing), str(row.largest)) if row.codes else ("-", "-", "-")
            rows.append((row.name or "(root)", _db(row.sqnr), f"{row.largest_difference:.3g}", *codes))
        lines = [f"{self.candidate} against {self.reference}, {self.samples} samples"]
        lines += text_table(rows) if self.layers else []
        if self.first_difference is not None:
            lines.append(f"first layer whose codes differ: {self.first_difference or '(root)'}")
        if self.agreement is not None:
            lines.append(f"top-1: the same for {self.agreement:.2%}")
        lines.append(f"output: largest difference {self.largest_difference:.3g}, SQNR {_db(self.sqnr)}")
        return "\n".join(lines)


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns: the first to the left, the others to the right.

    Example:
        >>> text_table([("a", "n"), ("bc", "12")])
        ['a    n', 'bc  12']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def _db(value: float) -> str:
    return "identical" if value == math.inf else f"{value:.1f} dB"


def _plain(value: Any) -> Any:
    """Tuples as lists, numbers that JSON has no word for as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
