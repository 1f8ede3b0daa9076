"""The verb `verify`: any two models, or ONNX files, side by side on the same batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from daqconvert.batches import split_batch
from daqconvert.deploy.agreement import Codes, Noise, Outputs
from daqconvert.deploy.probes import ModuleProbe, OnnxProbe, Probe
from daqconvert.deploy.reports import LayerComparison, VerifyReport
from daqconvert.errors import DataError, ExportError
from daqconvert.layers import FrozenSite, QuantizedSite

Model = nn.Module | str | Path


def verify(reference: Model, candidate: Model, batches: Iterable[Any], max_batches: int | None = None) -> VerifyReport:
    """Compare two models on the same batches: top-1 agreement, outputs, and every layer that both have.

    A layer is compared by the SQNR of its output; where both models have codes, by its input codes too. The report
    names the first layer whose codes differ, and `report.first_below(30)` the first one below 30 dB.

    Args:
        reference: A float, quantized or frozen model, or the path of an ONNX file; models run in evaluation mode and
            are not changed.
        candidate: Likewise.
        batches: Any iterable of batches, as `calibrate` takes them; targets are not used.
        max_batches: Read no more than this many.

    Returns:
        One row per layer in the reference's order of execution, and the outputs; `print` it.

    Raises:
        ExportError: If a file cannot be read, or outputs of one name have different shapes.
        DataError: If there is no batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.randn(16, 8)
        >>> calibrated = dq.calibrate(qmodel, [x])
        >>> dq.verify(qmodel, dq.freeze(qmodel), [x]).identical
        True
    """
    first, second = _probe(reference), _probe(candidate)
    known = set(second.layers())
    watch = {name for name in first.layers() if name in known}
    outputs, order = Outputs(), dict[str, tuple[Noise, Codes]]()
    count = 0
    for batch in itertools.islice(batches, max_batches):
        args, kwargs, _ = split_batch(batch)
        a, b = first.run(args, kwargs, watch), second.run(args, kwargs, watch)
        outputs.add_results(a.results, b.results)
        for name in [n for n in a.outputs if n in b.outputs]:
            noise, codes = order.setdefault(name, (Noise(), Codes()))
            noise.add(name or "(root)", a.outputs[name], b.outputs[name])
            if name in a.codes and name in b.codes:
                codes.add(name, a.codes[name], b.codes[name])
        count += 1
    if count == 0:
        raise DataError("verify: expected at least one batch, found none. Is the loader empty?")
    rows = (
        LayerComparison(name, noise.sqnr, noise.largest, codes.elements, codes.differing, codes.largest)
        for name, (noise, codes) in order.items()
    )
    return VerifyReport(
        _describe(reference), _describe(candidate), outputs.samples, outputs.class_agreement, outputs.sqnr,
        outputs.largest, tuple(rows),
    )  # fmt: skip


def _probe(model: Model) -> Probe:
    if isinstance(model, nn.Module):
        return ModuleProbe(model)
    if isinstance(model, (str, Path)):
        return OnnxProbe(model)
    raise ExportError(f"verify: expected a torch model or the path of an ONNX file, found {type(model).__name__}.")


def _describe(model: Model) -> str:
    if not isinstance(model, nn.Module):
        return Path(model).name
    kinds = {FrozenSite: "frozen", QuantizedSite: "quantized"}
    kind = next((word for cls, word in kinds.items() if any(isinstance(m, cls) for m in model.modules())), "float")
    return f"{kind} {type(model).__name__}"
