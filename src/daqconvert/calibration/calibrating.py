"""The verb `calibrate`: bounds of every quantizer from data in one pass, then output scales from the first batch.

An output scale starts at 1 if the operands' scales carry real units. If they do not (`site.unitless`), it starts as in
the paper at `mean|conv(x, W)| / mean|conv(x_q, W_q)|` on the first batch: the site's output in float divided by its
output from operands, both without bias, per channel if the scale has channels. This ratio does not exist for a channel
that computes only zeros (its input is zero on this batch, or the batch does not reach the site). Such a channel starts
at an estimate from its weight alone, because at 0 the gradient of `|output_scale|` is 0 too and the channel could
never recover.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.batches import run_batch
from daqconvert.calibration.observers import METHODS, InputObserver, observer_for
from daqconvert.convert import PLAN_ATTRIBUTE, require_quantized
from daqconvert.errors import CalibrationError, nearest
from daqconvert.functional.dasr import wide
from daqconvert.functional.grid import levels
from daqconvert.graph.watch import watching_weights
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, safe_products, watching
from daqconvert.models import disabled, evaluating, unchanged_on_error
from daqconvert.quantizers import InputQuantizer, WeightQuantizer
from daqconvert.quantizers.lsq import StepInputQuantizer
from daqconvert.report.progress import track


@dataclasses.dataclass(frozen=True)
class CalibratedInput:
    """What `calibrate` found for one quantized input.

    Attributes:
        name: Dotted name of the site, followed by `" (weight)"` for a weight that depends on the data.
        signed: Whether the input is signed.
        proven: Whether the sign was known from the model's dataflow before any data was seen.
        minimum: Smallest value seen.
        maximum: Largest value seen.
        lower: Chosen lower bound.
        upper: Chosen upper bound.
    """

    name: str
    signed: bool
    proven: bool
    minimum: float
    maximum: float
    lower: float
    upper: float


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did. It prints one line for each quantized input.

    Attributes:
        inputs: What was found for each input, in the order of the model.
        batches: Number of batches read.
        method: The method that chose the bounds.
        unseen: Names of the sites that no batch reached. If such a site has no bounds yet, it gets placeholders,
            `[-1, 1]` (`[0, 1]` if unsigned or of 1 bit); an undecided sign stays undecided.
    """

    inputs: tuple[CalibratedInput, ...]
    batches: int
    method: str
    unseen: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a plain-text table: name, sign, range seen, bounds chosen."""
        rows = [
            f"{i.name or '(root)'}: {'signed' if i.signed else 'unsigned'} ({'proven' if i.proven else 'from data'}), "
            f"seen [{i.minimum:.4g}, {i.maximum:.4g}], bounds [{i.lower:.4g}, {i.upper:.4g}]"
            f"{', negative values are clipped' if i.minimum < 0.0 and not i.signed else ''}"
            for i in self.inputs
        ]
        rows += [f"{name}: not reached by any batch" for name in self.unseen]
        return "\n".join([*rows, f"{len(self.inputs)} inputs calibrated on {self.batches} batches ({self.method})"])


def calibrate(
    qmodel: nn.Module, batches: Iterable[Any], *, method: str = "mse", max_batches: int | None = None,
    progress: bool = True,
) -> CalibrationReport:  # fmt: skip
    """Set the bounds of every quantizer from data in one pass, then the output scales from the first batch.

    The model computes in float and in evaluation mode while the inputs of its sites are observed. Its weights, modes
    and batch-norm statistics do not change. The sign of an input that `quantize` could not prove to be non-negative is
    decided here. Output scales start at 1 or, if weights are normalized as in the paper, at
    `mean|conv(x, W)| / mean|conv(x_q, W_q)|`.

    Args:
        qmodel: A model from `quantize`; it is changed in place.
        batches: Any iterable of batches, such as a `DataLoader`. A batch is a tensor, a tuple or list whose first
            entry is the input, or a dict of keyword arguments.
        method: How bounds are chosen: `"mse"` (least squared error, but `"std"` at 1 bit), `"minmax"`, `"percentile"`
            (99.99 per cent of the values) or `"std"` (3 standard deviations, as in the paper). With LSQ each step size
            starts at `2 mean|v| / sqrt(Q_p)` whatever the method.
        max_batches: Number of batches after which to stop; None reads all.
        progress: Show a progress bar if standard error is a terminal.

    Returns:
        What was seen and chosen for each input.

    Raises:
        CalibrationError: If there is no batch, a value is NaN or infinite, the method is unknown, or an input with
            negative values has 1 bit. The model is unchanged then.
        ConversionError: If the model is not quantized, or a forward uses the weight of a layer without calling the
            layer. The model is unchanged then.
        FrozenError: If the model is frozen.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), section 4.1 (initialization).

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> report = dq.calibrate(qmodel, [torch.randn(8, 4)])
        >>> [row.signed for row in report.inputs]
        [True, False]
    """
    sites = require_quantized(qmodel, "calibrate")
    if method not in METHODS:
        raise CalibrationError(
            f"calibrate: unknown method {method!r}; expected one of {', '.join(METHODS)}.{nearest(method, METHODS)}"
        )
    for site in sites.values():
        if isinstance(site.weight_quantizer, WeightQuantizer):
            weight = site.float_weight()
            assert weight is not None  # a weight that depends on data has an input quantizer
            site.weight_quantizer.check(weight)
    operands, first, count = _observe(qmodel, sites, batches, method, max_batches, progress)
    proven = {row.name for row in getattr(qmodel, PLAN_ATTRIBUTE, ()) if row.signed is not None}
    rows = _choose(operands, method, proven)
    unseen = tuple(dict.fromkeys(operand.name for key, operand in operands.items() if key not in rows))
    with unchanged_on_error(sites.values()):
        _set_bounds(sites, operands, rows)
        _set_output_scales(qmodel, sites, first)
    return CalibrationReport(tuple(rows.values()), count, method, unseen)


def is_calibrated(qmodel: nn.Module) -> bool:
    """Whether every quantizer of a quantized model has bounds."""
    return all(q.ready for site in require_quantized(qmodel, "is_calibrated").values() for q in _quantizers(site))


def _quantizers(site: QuantizedSite) -> list[Any]:
    return [q for q in (site.weight_quantizer, site.input_quantizer) if q is not None]


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A quantizer whose bounds come from data (of an input, or of a weight that depends on data) and its observer."""

    name: str
    role: str
    quantizer: InputQuantizer
    observer: InputObserver


class _Observing(Watcher):
    """Passes the input and the weight of a site to their observers."""

    def __init__(self, of_input: InputObserver | None, of_weight: InputObserver | None) -> None:
        self.of_input, self.of_weight = of_input, of_weight

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        if self.of_input is not None:
            self.of_input.observe(x)
        if self.of_weight is not None and weight is not None:
            self.of_weight.observe(weight)
        return x


def _operands(sites: dict[str, QuantizedSite], method: str) -> dict[int, _Operand]:
    """Return the quantizers that need data, by `id`, because sites that read the same tensor may share a quantizer."""
    found: dict[int, _Operand] = {}
    for site in sites.values():
        for role, quantizer in (("input", site.input_quantizer), ("weight", site.weight_quantizer)):
            if isinstance(quantizer, InputQuantizer) and id(quantizer) not in found:
                observer = observer_for(method, quantizer.bits, quantizer.by_mean)
                found[id(quantizer)] = _Operand(site.layer_name, role, quantizer, observer)
    return found


def _shared_layers(qmodel: nn.Module) -> set[str]:
    """Return the names of the layers whose weight is also used by a site that another module holds."""
    rows = getattr(qmodel, PLAN_ATTRIBUTE, ())
    calls = [row.site.call for row in rows if row.converted and row.site.call is not None]
    layers = ((tensor.removesuffix(".weight"), call.holder) for call in calls for tensor in call.tensors)
    return {layer for layer, holder in layers if layer != holder}


def _observe(
    qmodel: nn.Module,
    sites: dict[str, QuantizedSite],
    batches: Iterable[Any],
    method: str,
    max_batches: int | None,
    progress: bool,
) -> tuple[dict[int, _Operand], Any, int]:
    operands = _operands(sites, method)
    first, count = None, 0
    with ExitStack() as stack:
        for site in sites.values():
            parts = [operands.get(id(q)) for q in (site.input_quantizer, site.weight_quantizer)]
            observers = [None if part is None else part.observer for part in parts]
            stack.enter_context(watching(site, _Observing(*observers)))
        watch = watching_weights(qmodel, sites, _shared_layers(qmodel))
        for context in (evaluating(qmodel), disabled(qmodel), watch, torch.no_grad()):
            stack.enter_context(context)
        for batch in track(batches, "calibrating", max_batches, enabled=progress):
            run_batch(qmodel, batch)
            first = batch if count == 0 else first
            count += 1
            if max_batches is not None and count >= max_batches:
                break
    if count == 0:
        raise CalibrationError("calibrate: expected at least one batch, found none. Is the loader empty?")
    return operands, first, count


def _set_bounds(
    sites: dict[str, QuantizedSite], operands: dict[int, _Operand], rows: dict[int, CalibratedInput]
) -> None:
    for site in sites.values():
        quantizer, weight = site.weight_quantizer, site.float_weight()
        if isinstance(quantizer, WeightQuantizer) and weight is not None and not quantizer.ready:
            quantizer.initialize(weight)
    for key, operand in operands.items():
        if key in rows:
            operand.quantizer.set_bounds(rows[key].lower, rows[key].upper)
        elif not operand.quantizer.ready:
            operand.quantizer.set_placeholder()


def _choose(operands: dict[int, _Operand], method: str, proven: set[str]) -> dict[int, CalibratedInput]:
    rows, one_bit = {}, []
    for key, operand in operands.items():
        name, quantizer, observer = operand.name, operand.quantizer, operand.observer
        if not observer.finite:
            raise CalibrationError(
                f"{name or '(root)'}: its {operand.role} holds NaN or infinite values in the float model. Look for "
                "them in the calibration data or in the layers before it."
            )
        if not observer.seen:
            continue
        signed = observer.minimum < 0.0 if quantizer.sign is None else quantizer.sign
        if signed and quantizer.bits == 1:
            one_bit.append(f"{name or '(root)'} (down to {observer.minimum:.3g})")
        own = quantizer.start(observer.mean, signed) if isinstance(quantizer, StepInputQuantizer) else None
        lower, upper = own or METHODS[method](observer, quantizer.bits, signed)
        if upper <= 0.0 and lower >= 0.0:
            upper = 1.0  # an input that is always zero: any range represents it exactly
        known = operand.role == "input" and name in proven
        shown = name if operand.role == "input" else f"{name} (weight)"
        rows[key] = CalibratedInput(shown, signed, known, observer.minimum, observer.maximum, lower, upper)
    if one_bit:
        raise CalibrationError(
            f"calibrate: inputs with negative values need 2 bits or more, found 1 bit at: {', '.join(one_bit)}. "
            f'Give them a_bits = 2: [[rule]] match = "{one_bit[0].split(" ")[0]}", a_bits = 2.'
        )
    return rows


def _set_output_scales(qmodel: nn.Module, sites: dict[str, QuantizedSite], first: Any) -> None:
    with ExitStack() as stack:
        unitless = [site for site in sites.values() if site.unitless]
        for site in sites.values():
            if site.unitless:
                stack.enter_context(watching(site, _OutputScaleStart(site)))
            else:
                site.output_scale.data.fill_(1.0)
        if unitless:
            stack.enter_context(evaluating(qmodel))
            stack.enter_context(torch.no_grad())
            run_batch(qmodel, first)


class _OutputScaleStart(Watcher):
    """Watches a calibrated site that is `unitless` and sets its output scale from all its calls in one batch."""

    def __init__(self, site: QuantizedSite) -> None:
        with torch.no_grad():
            site.output_scale.copy_(_estimate(site))
        self.exact: Tensor | float = 0.0
        self.quantized: Tensor | float = 0.0

    @torch.no_grad()
    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        """Add one call of the site to the sums and set the scale from them, just before the site computes.

        Raises:
            CalibrationError: If the site's float output holds NaN or infinite values.
        """
        assert weight is not None
        start = site.output_scale.clone()
        site.output_scale.fill_(1.0)
        w, top = site.weight_quantizer(weight), site.sum_scale()
        operand = x if site.input_quantizer is None else site.input_quantizer(x)
        acc, scale = safe_products(operation, operand, w, top, site.settings)
        # NOTE: in float32, because the sums of a float16 layer may exceed 65504
        exact = operation(wide(x), wide(weight))
        self.exact = self.exact + _channel_mean(exact, site)
        self.quantized = self.quantized + _channel_mean(acc, site) * scale
        ratio = self.exact / self.quantized
        if not bool((torch.isfinite(ratio) | (self.quantized == 0)).all()):
            raise CalibrationError(
                f"{site.layer_name or '(root)'}: its output holds NaN or infinite values in the float model. "
                "Look for them in the calibration data or in the layers before it."
            )
        usable = (self.quantized > 0) & (ratio > 0)
        site.output_scale.copy_(torch.where(usable, ratio, start.to(ratio.dtype)))
        return x


def _estimate(site: QuantizedSite) -> Tensor:
    """Return `mean|W| / mean|W_q|`, per channel if the scale is, times the width of the input's range."""
    quantizer, weight = site.weight_quantizer, site.float_weight()
    assert isinstance(quantizer, WeightQuantizer) and weight is not None  # true of every unitless site
    weight, operand = wide(weight), wide(quantizer(weight)) / levels(quantizer.bits, quantizer.grid)
    layout, dim = quantizer.layout, site.output_scale.dim()
    mean, mean_q = (layout.rows(t).abs().mean(dim=1) if dim else t.abs().mean() for t in (weight, operand))
    ratio = mean / mean_q.clamp(min=1e-12)
    if site.input_quantizer is None:
        return ratio
    return ratio * site.input_quantizer.scale() * (2**site.input_quantizer.bits - 1)


def _channel_mean(y: Tensor, site: QuantizedSite) -> Tensor:
    """Return the mean absolute value, per output channel if the site has a scale for each channel."""
    size = wide(y.detach()).abs()
    if site.output_scale.dim() == 0:
        return size.mean()
    channel = size.movedim(-1 - site.output_dims, 0)
    return channel.reshape(channel.shape[0], -1).mean(dim=1)
