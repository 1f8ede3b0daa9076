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
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.batches import is_empty, run_batch
from daqconvert.calibration.observers import METHODS, InputObserver, observer_for, symmetric_bounds
from daqconvert.convert import PLAN_ATTRIBUTE, require_quantized
from daqconvert.errors import CalibrationError, DaqError, nearest
from daqconvert.functional.dasr import wide
from daqconvert.functional.grid import levels
from daqconvert.graph.watch import comparing, watching_weights
from daqconvert.kept_plan import plan_now
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, safe_products, watching
from daqconvert.models import disabled, evaluating, fit_weights, rehearsing, unchanged_on_error
from daqconvert.quantizers import InputQuantizer, WeightQuantizer
from daqconvert.quantizers.input import SymmetricInputQuantizer
from daqconvert.quantizers.lsq import StepInputQuantizer
from daqconvert.report.progress import track

MODES = {"eval": ("eval",), "train": ("train",), "both": ("eval", "train")}
"""Which forwards each value of `calibrate(mode=)` observes."""
ALIKE = 0.8  # ranges of the two modes differ if one is smaller than this part of the other


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
        by_mode: The bounds that each forward that reached the site asks for by itself, under `"eval"` and `"train"`.
    """

    name: str
    signed: bool
    proven: bool
    minimum: float
    maximum: float
    lower: float
    upper: float
    by_mode: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether evaluation and training mode ask for ranges of different width, of which one is 0.8 of the other."""
        widths = [high - low for low, high in self.by_mode.values()]
        return bool(widths) and min(widths) < ALIKE * max(widths)

    def __str__(self) -> str:
        """Return the input as one line of the report."""
        said = (
            f"{self.name or '(root)'}: {'signed' if self.signed else 'unsigned'} "
            f"({'proven' if self.proven else 'from data'}), seen [{self.minimum:.4g}, {self.maximum:.4g}], "
            f"bounds [{self.lower:.4g}, {self.upper:.4g}]"
        )
        if self.minimum < 0.0 and not self.signed:
            said += ", negative values are clipped"
        if self.differs:
            said += "".join(f", {mode} alone [{low:.4g}, {high:.4g}]" for mode, (low, high) in self.by_mode.items())
        return said


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What `calibrate` did. It prints one line for each quantized input.

    Attributes:
        inputs: What was found for each input, in the order of the model.
        batches: Number of batches read.
        method: The method that chose the bounds.
        unseen: Names of the sites that no batch reached. If such a site has no bounds yet, it gets placeholders,
            `[-1, 1]` (`[0, 1]` if unsigned or of 1 bit); an undecided sign stays undecided.
        mode: Which forwards were observed: `"eval"`, `"train"` or `"both"`.
        note: What was observed instead, where a forward in training mode failed; else `""`.
        refitted: Names of the sites whose weights were changed (loaded, scaled, replaced) after their bounds were set:
            the bounds were set anew. Bounds that were trained with their weights stay.
        unfit: Names of the sites whose bounds do not fit their weights although both have changed. These bounds stay.
    """

    inputs: tuple[CalibratedInput, ...]
    batches: int
    method: str
    unseen: tuple[str, ...] = ()
    mode: str = "both"
    note: str = ""
    refitted: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def differing(self) -> tuple[str, ...]:
        """Names of the inputs whose range in training mode is not that in evaluation mode."""
        return tuple(row.name or "(root)" for row in self.inputs if row.differs)

    def __str__(self) -> str:
        """Return a plain-text table: name, sign, range seen, bounds chosen; then what does not go without saying."""
        rows = [str(row) for row in self.inputs]
        rows += [f"{name}: not reached by any batch" for name in self.unseen]
        if self.differing:
            rows.append(
                f"{len(self.differing)} of {len(self.inputs)} inputs have another range in training mode than in "
                f"evaluation mode: {', '.join(self.differing)}"
            )
        rows += [self.note] if self.note else []
        rows += [f"{name}: its weight was changed: weight bounds set anew" for name in self.refitted]
        rows += [
            f"{name}: its weight bounds do not fit its weight, and stay, because both were changed: if they were not "
            "trained together, call daqconvert.load_float with the weights, then calibrate"
            for name in self.unfit
        ]
        observed = {"eval": "evaluation mode", "train": "training mode", "both": "both modes"}[self.mode]
        return "\n".join(
            [*rows, f"{len(self.inputs)} inputs calibrated on {self.batches} batches ({self.method}, {observed})"]
        )


def calibrate(
    qmodel: nn.Module, batches: Iterable[Any], *, method: str = "mse", mode: str = "both",
    max_batches: int | None = None, progress: bool = True,
) -> CalibrationReport:  # fmt: skip
    """Set the bounds of every quantizer from data in one pass, then the output scales from the first batch.

    The model computes in float while the inputs of its sites are observed: in evaluation mode, as it is deployed, and
    in training mode, as it is trained. Each bound is the wider one of the two modes. The modes differ where running
    statistics of batch norms are not those of the batches (a new network, a checkpoint on other data), where dropout
    acts, and where a head computes in training only. Weights, modes, buffers and the random state do not change.

    The sign of an input that `quantize` could not prove to be non-negative is decided here. Output scales start at 1
    or, if weights are normalized as in the paper, at `mean|conv(x, W)| / mean|conv(x_q, W_q)|`.

    Args:
        qmodel: A model from `quantize`; it is changed in place.
        batches: Any iterable of batches, such as a `DataLoader`. A batch is a tensor, a tuple or list whose first
            entry is the input, or a dict of keyword arguments.
        method: How bounds are chosen: `"mse"` (least squared error, but `"std"` at 1 bit), `"minmax"`, `"percentile"`
            (99.99 per cent of the values) or `"std"` (3 standard deviations, as in the paper). With LSQ each step size
            starts at `2 mean|v| / sqrt(Q_p)` whatever the method.
        mode: What is observed: `"eval"` if nothing is trained afterwards, `"train"` if training follows, or `"both"`.
            In training mode, batch norms use the statistics of the batch. If the model is in training mode, those that
            you have put in evaluation mode use their running statistics.
        max_batches: Number of batches after which to stop; None reads all.
        progress: Show a progress bar if standard error is a terminal.

    Returns:
        What was seen and chosen for each input; `differing` names those whose range is another in training mode.

    Raises:
        CalibrationError: If there is no batch, a value is NaN or infinite, the method or mode is unknown, or an input
            with negative values has 1 bit. The model is unchanged then.
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
    for name, value, known in (("method", method, METHODS), ("mode", mode, MODES)):
        if value not in known:
            raise CalibrationError(
                f"calibrate: unknown {name} {value!r}; expected one of {', '.join(known)}.{nearest(value, known)}"
            )
    for site in sites.values():
        if isinstance(site.weight_quantizer, WeightQuantizer):
            weight = site.float_weight()
            assert weight is not None  # a weight that depends on data has an input quantizer
            site.weight_quantizer.check(weight)
    forwards, operands = _Forwards(qmodel, mode), _operands(sites, method, MODES[mode])
    tracked = track(batches, "calibrating", max_batches, enabled=progress)
    first, count = _observe(forwards, sites, operands, islice(tracked, max_batches))
    proven = {row.name for row in getattr(qmodel, PLAN_ATTRIBUTE, ()) if row.signed is False}
    rows = _choose(operands, method, proven)
    unseen = tuple(dict.fromkeys(operand.name for key, operand in operands.items() if key not in rows))
    with unchanged_on_error(sites.values()):
        refitted, unfit = fit_weights(sites)
        _set_bounds(operands, rows)
        _set_output_scales(forwards, sites, first)
    return CalibrationReport(tuple(rows.values()), count, method, unseen, mode, forwards.note, refitted, unfit)


def is_calibrated(qmodel: nn.Module) -> bool:
    """Whether every quantizer of a quantized model has bounds."""
    return all(q.ready for site in require_quantized(qmodel, "is_calibrated").values() for q in _quantizers(site))


def _quantizers(site: QuantizedSite) -> list[Any]:
    return [q for q in (site.weight_quantizer, site.input_quantizer) if q is not None]


@dataclasses.dataclass(frozen=True)
class _Operand:
    """A quantizer whose bounds come from data, of an input or a weight that depends on data; an observer a mode."""

    name: str
    role: str
    quantizer: InputQuantizer
    observers: dict[str, InputObserver]


class _Forwards:
    """Runs a model on one batch after another, in the modes that are observed.

    A training forward may need what a batch for calibration does not have, as a detector needs boxes. If one fails
    where evaluation mode is observed as well, batch norms alone are put in training mode from then on; if that fails
    too, training mode is not observed any more. `note` says so.

    Attributes:
        mode: The mode that is running: a key of every `_Operand.observers`.
    """

    def __init__(self, qmodel: nn.Module, mode: str) -> None:
        self.qmodel, self.modes, self.mode = qmodel, MODES[mode], MODES[mode][0]
        self.note = ""
        self._norms_only = False

    def run(self, batch: Any, number: int) -> None:
        """Run one batch in each mode; random numbers of a training forward follow from the batch's number."""
        for mode in self.modes:
            self.mode = mode
            if mode == "eval":
                with evaluating(self.qmodel), torch.no_grad():
                    run_batch(self.qmodel, batch)
            else:
                self._rehearse(batch, number)

    def _rehearse(self, batch: Any, number: int) -> None:
        try:
            with rehearsing(self.qmodel, number, norms_only=self._norms_only), torch.no_grad():
                run_batch(self.qmodel, batch)
        except DaqError:
            raise
        except Exception as error:  # NOTE: any error, because it is the user's forward that runs
            if "eval" not in self.modes:
                error.add_note('calibrate(mode="train") runs the model in training mode; mode="eval" does not.')
                raise
            done = "training mode was not observed" if self._norms_only else "batch norms alone had training mode"
            self.note = f"{done}, because the model's forward raised {type(error).__name__} in it: {error}"
            if self._norms_only:
                self.modes = ("eval",)
            else:
                self._norms_only = True
                self._rehearse(batch, number)


class _Observing(Watcher):
    """Passes the input and the weight of a site to their observers."""

    def __init__(self, forwards: _Forwards, of_input: _Operand | None, of_weight: _Operand | None) -> None:
        self.forwards, self.of_input, self.of_weight = forwards, of_input, of_weight

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        if self.of_input is not None:
            self.of_input.observers[self.forwards.mode].observe(x)
        if self.of_weight is not None and weight is not None:
            self.of_weight.observers[self.forwards.mode].observe(weight)
        return x


def _operands(sites: dict[str, QuantizedSite], method: str, modes: tuple[str, ...]) -> dict[int, _Operand]:
    """Return the quantizers that need data, by `id`, because sites that read the same tensor may share a quantizer."""
    found: dict[int, _Operand] = {}
    for site in sites.values():
        for role, quantizer in (("input", site.input_quantizer), ("weight", site.weight_quantizer)):
            if isinstance(quantizer, InputQuantizer) and id(quantizer) not in found:
                observers = {mode: observer_for(method, quantizer.bits, quantizer.by_mean) for mode in modes}
                found[id(quantizer)] = _Operand(site.layer_name, role, quantizer, observers)
    return found


def _shared_layers(qmodel: nn.Module) -> set[str]:
    """Return the names of the layers whose weight is also used by a site that another module holds."""
    rows = getattr(qmodel, PLAN_ATTRIBUTE, ())
    calls = [row.site.call for row in rows if row.converted and row.site.call is not None]
    layers = ((tensor.removesuffix(".weight"), call.holder) for call in calls for tensor in call.tensors)
    return {layer for layer, holder in layers if layer != holder}


def _observe(
    forwards: _Forwards, sites: dict[str, QuantizedSite], operands: dict[int, _Operand], batches: Iterable[Any],
) -> tuple[Any, int]:  # fmt: skip
    """Observe the float model on all batches; return the first that is not empty, and their number."""
    qmodel, first, count = forwards.qmodel, None, 0
    with ExitStack() as stack:
        for site in sites.values():
            parts = [operands.get(id(q)) for q in (site.input_quantizer, site.weight_quantizer)]
            stack.enter_context(watching(site, _Observing(forwards, *parts)))
        stack.enter_context(disabled(qmodel))
        stack.enter_context(comparing(qmodel, sites, plan_now(qmodel)))
        shared = _shared_layers(qmodel)
        for count, batch in enumerate(batches, 1):
            with watching_weights(qmodel, sites, shared):
                forwards.run(batch, count)
            first = batch if first is None and not is_empty(batch) else first
    if count == 0:
        raise CalibrationError("calibrate: expected at least one batch, found none. Is the loader empty?")
    if first is None:
        raise CalibrationError(
            f"calibrate: expected a batch with inputs, found {count} of size 0. Look at the loader."
        )
    return first, count


def _set_bounds(operands: dict[int, _Operand], rows: dict[int, CalibratedInput]) -> None:
    for key, operand in operands.items():
        if key in rows:
            operand.quantizer.set_bounds(rows[key].lower, rows[key].upper)
        elif not operand.quantizer.ready:
            operand.quantizer.set_placeholder()


def _choose(operands: dict[int, _Operand], method: str, proven: set[str]) -> dict[int, CalibratedInput]:
    rows, one_bit = {}, []
    for key, operand in operands.items():
        name, quantizer = operand.name, operand.quantizer
        if not all(observer.finite for observer in operand.observers.values()):
            raise CalibrationError(
                f"{name or '(root)'}: its {operand.role} holds NaN or infinite values in the float model. Look for "
                "them in the calibration data or in the layers before it."
            )
        seen = {mode: observer for mode, observer in operand.observers.items() if observer.seen}
        if not seen:
            continue
        minimum, maximum = min(o.minimum for o in seen.values()), max(o.maximum for o in seen.values())
        signed = minimum < 0.0 if quantizer.sign is None else quantizer.sign
        if signed and quantizer.bits == 1:
            one_bit.append(f"{name or '(root)'} (down to {minimum:.3g})")
        bounds = {mode: _bounds(quantizer, observer, method, signed) for mode, observer in seen.items()}
        lower, upper = min(low for low, _ in bounds.values()), max(high for _, high in bounds.values())
        upper = 1.0 if upper <= 0.0 <= lower else upper  # any range represents an input that is always zero
        lower, upper = quantizer.fit(lower, upper)
        known = operand.role == "input" and name in proven
        shown = name if operand.role == "input" else f"{name} (weight)"
        rows[key] = CalibratedInput(shown, signed, known, minimum, maximum, lower, upper, bounds)
    if one_bit:
        raise CalibrationError(
            f"calibrate: inputs with negative values need 2 bits or more, found 1 bit at: {', '.join(one_bit)}. "
            f'Give them a_bits = 2: [[rule]] match = "{one_bit[0].split(" ")[0]}", a_bits = 2.'
        )
    return rows


def _bounds(quantizer: InputQuantizer, observer: InputObserver, method: str, signed: bool) -> tuple[float, float]:
    """Return the bounds for what was observed in one mode."""
    own = quantizer.start(observer.mean, signed) if isinstance(quantizer, StepInputQuantizer) else None
    if own is None and method == "mse" and isinstance(quantizer, SymmetricInputQuantizer) and signed:
        own = symmetric_bounds(observer, quantizer.bits)
    return own or quantizer.fit(*METHODS[method](observer, quantizer.bits, signed))


def _set_output_scales(forwards: _Forwards, sites: dict[str, QuantizedSite], first: Any) -> None:
    with ExitStack() as stack:
        unitless = [site for site in sites.values() if site.unitless]
        for site in sites.values():
            if site.unitless:
                stack.enter_context(watching(site, _OutputScaleStart(site)))
            else:
                site.output_scale.data.fill_(1.0)
        if unitless:
            forwards.run(first, 1)


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
        if x.numel() == 0:  # a box head without boxes: it says nothing of the scale
            return x
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
    layout, rows = quantizer.layout, site.scales_channels
    mean, mean_q = (layout.rows(t).abs().mean(dim=1) if rows else t.abs().mean() for t in (weight, operand))
    ratio = mean / mean_q.clamp(min=1e-12)
    if site.input_quantizer is None:
        return ratio
    return ratio * site.input_quantizer.scale() * (2**site.input_quantizer.bits - 1)


def _channel_mean(y: Tensor, site: QuantizedSite) -> Tensor:
    """Return the mean absolute value, per output channel if the site has a scale for each channel."""
    size = wide(y.detach()).abs()
    if not site.scales_channels:
        return size.mean()
    channel = size.movedim(-1 - site.output_dims, 0)
    return channel.reshape(channel.shape[0], -1).mean(dim=1)
