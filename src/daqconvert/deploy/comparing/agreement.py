"""How two models differ, summed up over batches: signal and noise, equal classes, differing codes."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from daqconvert.deploy.comparing.export_report import SAME_CODES_SQNR, LayerAgreement, db_text
from daqconvert.deploy.comparing.probes import ModuleProbe, OnnxProbe
from daqconvert.errors import ExportError


class Noise:
    """Signal `sum(reference^2)`, noise `sum((reference - candidate)^2)` and the largest difference, in float64."""

    def __init__(self) -> None:
        self.signal = self.noise = self.largest = 0.0

    def add(self, name: str, reference: list[Tensor], candidate: list[Tensor]) -> None:
        """Add the tensors of two models, pair by pair; `name` is what messages call them.

        Raises:
            ExportError: If the two lists differ in length or in a shape.
        """
        shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in candidate]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{name}: expected tensors of shapes {shapes[0]}, found {shapes[1]}.")
        for wanted, found in zip(reference, candidate, strict=True):
            wide, difference = wanted.double(), found.double() - wanted.double()
            same = (wide == found.double()) | (wide.isnan() & found.isnan())  # inf - inf is NaN
            difference = torch.where(same, 0.0, difference).abs()
            self.signal += float(torch.where(wide.isfinite(), wide, 0.0).square().sum())
            self.noise += float(difference.square().sum())
            if difference.numel():
                self.largest = max(self.largest, float(difference.nan_to_num(math.inf).max()))

    @property
    def sqnr(self) -> float:
        """`10 log10(signal / noise)`; infinite where nothing differs, minus infinity where there is no signal."""
        if self.noise == 0.0:
            return math.inf
        if not math.isfinite(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf


class OutputNoise(Noise):
    """Signal and noise of a model's outputs, and equal classes.

    A sample's class is the index of the largest entry in its row of the first output of shape `(N, classes)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.equal = self.samples = 0

    def add_results(self, reference: list[Tensor], candidate: list[Tensor]) -> None:
        """Add the outputs of one batch."""
        self.add("output", reference, candidate)
        self.samples += reference[0].shape[0] if reference and reference[0].dim() else 1
        for wanted, found in zip(reference, candidate, strict=True):
            if wanted.dim() == 2 and wanted.shape[1] > 1:
                self.rows += wanted.shape[0]
                self.equal += int((wanted.argmax(1) == found.argmax(1)).sum())
                return

    @property
    def class_agreement(self) -> float | None:
        """Share of samples with the same class; None where no output is of shape `(N, classes)`."""
        return self.equal / self.rows if self.rows else None


class CodeDifferences:
    """How many codes of one layer differ, and by how much."""

    def __init__(self) -> None:
        self.elements = self.differing = self.largest = 0

    def add(self, name: str, reference: list[Tensor], candidate: list[Tensor]) -> None:
        """Add the codes of every call of a layer.

        Raises:
            ExportError: If the numbers of calls or the shapes differ.
        """
        shapes = [tuple(t.shape) for t in reference], [tuple(t.shape) for t in candidate]
        if shapes[0] != shapes[1]:
            raise ExportError(f"{name or '(root)'}: expected codes of shapes {shapes[0]}, found {shapes[1]}.")
        for wanted, found in zip(reference, candidate, strict=True):
            difference = (wanted.to(torch.int16) - found.to(torch.int16)).abs()
            self.elements += difference.numel()
            self.differing += int(difference.count_nonzero())
            self.largest = max(self.largest, int(difference.max()) if difference.numel() else 0)


class FileAgreement:
    """Compares a frozen model with its ONNX file, given as bytes.

    For each batch the model runs twice: once on its own, and once with the input codes of every layer replaced by
    those that the layer has in the file. In the second run, differences do not add up from layer to layer: each shows
    where it arises.
    """

    def __init__(self, model: ModuleProbe, content: bytes) -> None:
        self.model, self.file = model, OnnxProbe(content, ["codes"])
        self.names = [name for name, tensors in self.file.tensors.items() if tensors["codes"]]
        self._other: list[str] = []
        self._start()

    def _start(self) -> None:
        self.outputs, self.outputs_same = OutputNoise(), OutputNoise()
        self.codes = {name: CodeDifferences() for name in self.names}
        self.codes_same = {name: CodeDifferences() for name in self.names}

    def add(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Run model and file on the arguments of one batch, and add up how they differ."""
        watch = set(self.names)
        own, theirs = self.model.run(args, kwargs, watch), self.file.run(args, kwargs, watch)
        same = self.model.run(args, kwargs, watch, forced=theirs.codes) if watch else own
        self.outputs.add_results(own.results, theirs.results)
        self.outputs_same.add_results(same.results, theirs.results)
        for name in self.names:
            self.codes[name].add(name, own.codes[name], theirs.codes[name])
            self.codes_same[name].add(name, same.codes[name], theirs.codes[name])

    def add_other(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Compare at another batch size: the arguments repeat samples, so they count for `other_problems` alone."""
        apart = copy.copy(self)
        apart._start()
        apart.add(args, kwargs)
        sqnr, wrong = apart.outputs_same.sqnr, [row.name for row in apart.layers() if row.largest_same > 1]
        if not sqnr >= SAME_CODES_SQNR:
            self._other.append(f"for the same codes the output's SQNR is {db_text(sqnr)}")
        if wrong:
            self._other.append(f"codes of {wrong[0] or '(root)'} differ by several levels for the same input codes")

    def other_problems(self) -> list[str]:
        """Return why model and file do not agree at another batch size; empty where they do, or none was tried."""
        return self._other

    def layers(self) -> tuple[LayerAgreement, ...]:
        """Return the agreement of each layer's input codes."""
        return tuple(
            LayerAgreement(
                name, self.codes[name].elements, self.codes[name].differing, self.codes[name].largest,
                self.codes_same[name].differing, self.codes_same[name].largest,
            )
            for name in self.names
        )  # fmt: skip
