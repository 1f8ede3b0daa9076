"""What `export` returns: how well a file agrees with the model it was made from, as values, text and JSON.

Units: shares are 0..1, SQNR is `10 log10(sum(reference^2) / sum((reference - candidate)^2))` in decibels, infinite (in
JSON: null) where nothing differs; differences of codes are in levels.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from daqconvert.spec.text_table import text_table

CODE_SHARE = 1e-4  # largest share of codes that may differ for the same input codes, by one level; one code always may
CLASS_SHARE = 0.999  # smallest share of equal classes; one sample's class may always differ
SAME_CODES_SQNR = 60.0  # smallest SQNR of the output for the same codes; with float32 rounding alone it is far higher


@dataclass(frozen=True)
class LayerAgreement:
    """How well the input codes of one layer agree between the frozen model and its file.

    Attributes:
        name: Dotted name of the layer.
        elements: Number of codes compared.
        differing: Number of codes that differ when model and file each run on their own.
        largest: Largest of these differences, in levels.
        differing_same: Number of codes that differ when the layers before get the same input codes in model and file.
        largest_same: Largest of these differences, in levels.
    """

    name: str
    elements: int
    differing: int
    largest: int
    differing_same: int
    largest_same: int

    @property
    def share(self) -> float:
        """Share of codes that differ when model and file each run on their own."""
        return self.differing / max(self.elements, 1)

    @property
    def share_same(self) -> float:
        """Share of codes that differ when the layers before get the same input codes."""
        return self.differing_same / max(self.elements, 1)

    @property
    def agrees(self) -> bool:
        """Whether, for the same input codes, at most 1 code in 10,000 differs, by one level; one code always may."""
        return self.largest_same <= 1 and self.differing_same <= max(1.0, CODE_SHARE * self.elements)


@dataclass(frozen=True)
class ExportReport:
    """How well the ONNX file that `export` wrote, run in ONNX Runtime, agrees with its model.

    Attributes:
        path: The file.
        file_bytes: Its size.
        layers: Agreement of the input codes of each layer that has codes, in the order of execution.
        samples: Number of samples compared.
        largest_difference: Largest absolute difference of an output.
        sqnr: SQNR of the outputs.
        sqnr_same_codes: SQNR of the outputs when every layer gets the same input codes in model and file, so that
            nothing but float rounding differs.
        class_agreement: Share of samples with the same class, or None where no output is of shape `(N, classes)`.
        notes: What else a user of the file has to know, a sentence each.
        other_batch: Why the file does not agree at another batch size than that of the example; empty where it does,
            or the batch is fixed.
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
    other_batch: tuple[str, ...] = ()

    @property
    def classes_differing(self) -> int:
        """Number of samples whose class differs."""
        return 0 if self.class_agreement is None else round((1 - self.class_agreement) * self.samples)

    @property
    def agrees(self) -> bool:
        """Whether the file computes what the model computes: codes, outputs for the same codes, classes."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Return the reasons why the file does not agree, a sentence each; an empty list if it does."""
        found = [
            f"{layer.name or '(root)'}: {layer.differing_same} of {layer.elements} codes differ for the same input "
            f"codes, by up to {layer.largest_same} levels (allowed: 1 of 10,000, by 1)"
            for layer in self.layers
            if not layer.agrees
        ]
        if not self.sqnr_same_codes >= SAME_CODES_SQNR:
            found.append(f"for the same codes the output's SQNR is {db_text(self.sqnr_same_codes)}")
        if self.classes_differing > max(1.0, (1 - CLASS_SHARE) * self.samples):
            why = "" if found else "; layer by layer the codes agree, so the network amplifies float32 rounding"
            found.append(f"the class differs for {self.classes_differing} of {self.samples} samples{why}")
        return found + [f"at another batch size than the example's: {problem}" for problem in self.other_batch]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        rows = [{**dataclasses.asdict(row), "agrees": row.agrees} for row in self.layers]
        return plain({**dataclasses.asdict(self), "layers": rows, "agrees": self.agrees})

    def __str__(self) -> str:
        """Return a plain-text table: a row for each layer whose codes differ, and the totals."""
        lines = [f"{self.path}: {self.file_bytes:,} bytes"]
        different = [layer for layer in self.layers if layer.differing or layer.differing_same]
        if different:
            rows = [("layer", "codes", "differing", "by levels", "for the same input codes", "by levels")]
            for row in different:
                own, same = f"{row.differing} ({row.share:.2g})", f"{row.differing_same} ({row.share_same:.2g})"
                cells = (own, str(row.largest), same, str(row.largest_same))
                rows.append((row.name or "(root)", str(row.elements), *cells))
            lines += text_table(rows, right=range(1, 6))
        if self.layers:
            lines.append(f"codes: identical in {len(self.layers) - len(different)} of {len(self.layers)} layers")
        lines.append(f"output: largest difference {self.largest_difference:.3g}, SQNR {db_text(self.sqnr)}")
        if self.class_agreement is not None:
            lines.append(f"class: the same for {self.class_agreement:.2%} of {self.samples} samples")
        verdict = "agrees" if self.agrees else "DOES NOT AGREE: " + "; ".join(self.problems())
        return "\n".join([*lines, *self.notes, f"ONNX Runtime, {self.samples} samples: {verdict}"])


@dataclass(frozen=True)
class ProgramReport:
    """How well the program of `torch.export` that `export` wrote agrees with its model.

    Attributes:
        path: The file.
        file_bytes: Its size.
        samples: Number of samples compared.
        largest_difference: Largest absolute difference of an output; 0 where every element is the same.
        notes: What else a user of the file has to know, a sentence each.
    """

    path: str
    file_bytes: int
    samples: int
    largest_difference: float
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether every element of the reloaded program's outputs equals the model's."""
        return self.largest_difference == 0.0

    def problems(self) -> list[str]:
        """Return the reasons why the program does not agree, a sentence each; an empty list if it does."""
        return [] if self.agrees else [f"an output differs by {self.largest_difference:.3g}"]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return plain({**vars(self), "agrees": self.agrees})

    def __str__(self) -> str:
        """Return two lines of text, and the notes between them."""
        same = "identical" if self.agrees else f"DOES NOT AGREE: {'; '.join(self.problems())}"
        first, last = f"{self.path}: {self.file_bytes:,} bytes", f"reloaded, {self.samples} samples: {same}"
        return "\n".join([first, *self.notes, last])


def db_text(value: float) -> str:
    """Return an SQNR as text: in dB, or `identical` if it is infinite.

    Example:
        >>> db_text(12.34), db_text(math.inf)
        ('12.3 dB', 'identical')
    """
    return "identical" if value == math.inf else f"{value:.1f} dB"


def plain(value: Any) -> Any:
    """Return nested dicts, lists and tuples as JSON can hold them: infinite and undefined numbers become None.

    Example:
        >>> plain({"a": (1, math.inf)})
        {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
