"""The verb `verify`: any two models, or ONNX files, side by side on the same batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from daqconvert.artifact import load, read_manifest
from daqconvert.batches import split_batch
from daqconvert.deploy.comparing.agreement import CodeDifferences, Noise, OutputNoise
from daqconvert.deploy.comparing.probes import (
    ModuleProbe,
    OnnxProbe,
    Probe,
    Recording,
    epilogues,
    planned_epilogues,
)
from daqconvert.deploy.comparing.verify_report import LayerComparison, VerifyReport
from daqconvert.deploy.onnx.runtime import PROGRAM, read_program
from daqconvert.errors import DataError, ExportError
from daqconvert.layers import FrozenSite, QuantizedSite
from daqconvert.spec import SiteOutput

Model = nn.Module | str | Path
Pair = tuple[str, str]


def verify(reference: Model, candidate: Model, batches: Iterable[Any], max_batches: int | None = None) -> VerifyReport:
    """Compare two models on the same batches: top-1 agreement, outputs, and every layer that both have.

    A layer is compared by the SQNR of its output and, where both models have codes, by its input codes. The report
    names the first layer whose codes differ; `report.first_below(30)` names the first layer below 30 dB, and
    `report.plot("depth.png")` draws the SQNR by depth.

    Args:
        reference: A float, quantized or frozen model, or the path of an ONNX file, a `.pt2` program or an artifact; a
            model runs in evaluation mode and is not changed. Of a program only outputs are compared. An artifact that
            names no source is loaded into the structure of the float model that it is compared with.
        candidate: The other model or path.
        batches: An iterable of batches in the forms that `calibrate` takes; targets are not used.
        max_batches: Upper limit of the batches that are read; None for all.

    Returns:
        A row for each layer in the reference's order of execution, and figures of the outputs; `print` it.

    Raises:
        ExportError: If a file cannot be read, or outputs or codes have different shapes in the two models.
        DataError: If there is no batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.randn(16, 8)
        >>> calibrated = dq.calibrate(qmodel, [x])
        >>> dq.verify(qmodel, dq.freeze(qmodel), [x]).identical
        True
    """
    models = {"reference": reference, "candidate": candidate}
    names = {"reference": _describe(reference), "candidate": _describe(candidate)}
    (report,) = verify_all(models, [("reference", "candidate")], batches, max_batches, names)
    return report


def verify_all(
    models: Mapping[str, Model], pairs: Sequence[Pair], batches: Iterable[Any], max_batches: int | None = None,
    names: Mapping[str, str] | None = None,
) -> list[VerifyReport]:  # fmt: skip
    """Compare pairs of models, given by their keys, and return a report for each pair; a model runs once per batch.

    `names` gives, by key, what the reports call the models; without it they call them by their keys.

    Raises:
        DataError: If there is no batch.
    """
    skeleton = next(
        (m for m in models.values() if isinstance(m, nn.Module) and _describe(m).startswith("float")), None
    )
    probes = {key: _probe(model, skeleton) for key, model in models.items()}
    folded = _folded(probes.values())
    for probe in probes.values():
        if isinstance(probe, ModuleProbe):
            probe.epilogues = folded
    known = {key: set(probe.layers()) for key, probe in probes.items()}
    partners: dict[str, set[str]] = {key: set() for key in models}
    for first, second in pairs:
        shared = known[first] & known[second]
        partners[first] |= shared
        partners[second] |= shared
    sums = {pair: _Sums() for pair in pairs}
    module = next((model for model in models.values() if isinstance(model, nn.Module)), None)
    count = 0
    for batch in itertools.islice(batches, max_batches):
        args, kwargs, _ = split_batch(batch, module)
        found = {key: probe.run(args, kwargs, partners[key]) for key, probe in probes.items()}
        for (first, second), pair_sums in sums.items():
            pair_sums.add(found[first], found[second])
        count += 1
    if count == 0:
        raise DataError("verify: expected at least one batch, found none. Is the loader empty?")
    called = names or {key: key for key in models}
    return [pair_sums.report(called[first], called[second]) for (first, second), pair_sums in sums.items()]


class _Sums:
    """How two models differ, in their outputs and layer by layer, summed up over batches."""

    def __init__(self) -> None:
        self.outputs = OutputNoise()
        self.layers: dict[str, tuple[Noise | None, CodeDifferences]] = {}

    def add(self, reference: Recording, candidate: Recording) -> None:
        """Add one batch; raises `ExportError` if outputs or codes of one layer have different shapes."""
        self.outputs.add_results(reference.results, candidate.results)
        for name in dict.fromkeys([*reference.outputs, *reference.codes]):
            outputs = name in reference.outputs and name in candidate.outputs
            outputs = outputs and (name in reference.after) == (name in candidate.after)  # else two quantities
            codes = name in reference.codes and name in candidate.codes
            if not (outputs or codes):
                continue
            noise, code_sums = self.layers.setdefault(name, (Noise() if outputs else None, CodeDifferences()))
            if noise is not None:
                noise.add(name or "(root)", reference.outputs[name], candidate.outputs[name])
            if codes:
                code_sums.add(name, reference.codes[name], candidate.codes[name])

    def report(self, reference: str, candidate: str) -> VerifyReport:
        """Return the report, in which the models have these names."""
        rows = (
            LayerComparison(
                name, None if noise is None else noise.sqnr, None if noise is None else noise.largest,
                codes.elements, codes.differing, codes.largest,
            )
            for name, (noise, codes) in self.layers.items()
        )  # fmt: skip
        outputs = self.outputs
        return VerifyReport(
            reference, candidate, outputs.samples, outputs.class_agreement, outputs.sqnr, outputs.largest, tuple(rows)
        )


def _folded(probes: Iterable[Probe]) -> dict[str, SiteOutput]:
    """Return the epilogues of all layers that some model or file of the comparison has folded in."""
    found: dict[str, SiteOutput] = {}
    planned: dict[str, SiteOutput] = {}
    unsaid: set[str] = set()
    for probe in probes:
        if isinstance(probe, ModuleProbe):
            found |= epilogues(probe.model)
            planned |= planned_epilogues(probe.model)
        elif isinstance(probe, OnnxProbe):
            found |= {name: output for name, output in probe.epilogues.items() if output is not None}
            unsaid |= {name for name, output in probe.epilogues.items() if output is None}
    return {name: planned[name] for name in unsaid & planned.keys()} | found


def _probe(model: Model, skeleton: nn.Module | None) -> Probe:
    if isinstance(model, nn.Module):
        return ModuleProbe(model)
    if not isinstance(model, (str, Path)):
        raise ExportError(
            "verify: expected a torch model or the path of an ONNX file, a .pt2 program or an artifact, found "
            f"{type(model).__name__}."
        )
    path = Path(model)
    if path.suffix.lower() == PROGRAM:
        return ModuleProbe(read_program(path))
    if path.is_dir():
        return ModuleProbe(load(path, None if read_manifest(path).source else skeleton))
    return OnnxProbe(path)


def _describe(model: Model) -> str:
    if not isinstance(model, nn.Module):
        return Path(model).name if isinstance(model, (str, Path)) else type(model).__name__
    kinds = {FrozenSite: "frozen", QuantizedSite: "quantized"}
    kind = next((word for cls, word in kinds.items() if any(isinstance(m, cls) for m in model.modules())), "float")
    return f"{kind} {type(model).__name__}"
