"""The state that every frozen site shares: uint8 codes instead of a weight, scales instead of bounds.

    operand_x = clip(round(x / input_scale), -input_zero_point, n - input_zero_point)
    operand_w = codes * spacing + lowest                 spacing and lowest: functional.grid.coding(w_bits, grid)
    y         = operation(operand_x, operand_w) * scale + bias

If `deploy="integer"` rounds the site's output (`FrozenSite.is_integer`), `functional.integer` replaces the last line:
it computes exact integer sums, bias included, and from the sums the codes of the output.

The operand of a weight is decoded in every forward, unless `daqconvert.cache_weights` has given the site an
`OperandCache`. The cache takes 4 bytes of memory for each weight, in addition to the 1 byte of its code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import FrozenError
from daqconvert.functional.input_operator import input_operand
from daqconvert.functional.integer import IntegerLayer, exact_sums, output_values
from daqconvert.functional.native import only_values
from daqconvert.functional.product_operator import can_fuse
from daqconvert.functional.products import KNOWN, PaddedProducts, rescale, rescale_
from daqconvert.functional.weight_operator import weight_operand
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, safe_products
from daqconvert.quantizers import ChannelLayout, WeightQuantizer
from daqconvert.spec import Settings

INTEGER_BUFFERS = ("w_scale", "w_factor", "bias_codes", "y_scale", "y_zero_point", "y_range")
"""The buffers that hold the fields of an `IntegerLayer`, in the order of the fields."""

OWN_BUFFERS = ("weight_codes", "scale", "input_scale", "input_zero_point", "weight_scale", "weight_zero_point")
BUFFERS = (*OWN_BUFFERS, *INTEGER_BUFFERS)
SCALES = ("scale", "input_scale", "weight_scale", "w_scale", "y_scale")


class FrozenSite(nn.Module):
    """Mixin of every module that holds the codes and scales of a frozen site. It cannot be trained.

    Attributes:
        weight_codes: uint8 buffer `0 .. 2**w_bits - 1`, shape of the weight; absent if the weight stays float or
            depends on the data.
        scale: float32 buffer, `()` or `(C_out,)`: real units per integer sum.
        input_scale: float32 scalar buffer; absent if the input stays float.
        input_zero_point: uint8 scalar buffer; absent if the input stays float.
        weight_scale: float32 scalar buffer; only for a weight that depends on the data.
        weight_zero_point: uint8 scalar buffer; only for a weight that depends on the data.
        settings: Settings of the site's row in the plan.
        dtype: Dtype of the operands.
        qdq: If True, operands and rescaling are computed by one named operator each (`deploy.onnx.frozen_operators`),
            as export needs; the values are the same.
        watchers: The watchers that `watching` has attached.
        cache: Keeps the weight's operand after `keep_operand()`; None if every forward decodes the codes.
    """

    weight_codes: Tensor
    scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    output_dims: int
    settings: Settings
    layer_name: str
    qdq: bool
    dtype: torch.dtype
    watchers: tuple[Watcher, ...]
    cache: OperandCache | None

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, operation: Operation) -> Tensor:
        """Return the site's output for a float input, computed from integer-valued operands.

        Args:
            x: Float input.
            weight: The float weight; not used if the site has codes.
            bias: Float bias `(C_out,)`, or None for no bias.
            operation: The bare products.

        Raises:
            FrozenError: In training mode.
        """
        if self.training:
            raise FrozenError(_no_training(self.layer_name))
        for watcher in self.watchers:
            x = watcher.before(self, x, weight, operation)
        operand = x if self.settings.a_bits is None else self.input_operand(x)
        y = self._output(operand, self.weight_operand(weight), bias, operation)
        for watcher in self.watchers:
            watcher.after(self, y)
        return y

    def input_operand(self, x: Tensor) -> Tensor:
        """Return `code - zero_point` of an input: integer values in the input's dtype."""
        return self._operand(x, self.input_scale, self.input_zero_point, self.settings.a_bits, "input")

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the codes `0 .. 2**a_bits - 1` of an input, uint8."""
        return (self.input_operand(x) + self.input_zero_point).to(torch.uint8)

    def weight_operand(self, weight: Tensor | None = None) -> Tensor:
        """Return the weight's operand in the model's dtype, or the weight itself if it stays float.

        The float `weight` is not needed if the site has codes.
        """
        bits = self.settings.w_bits
        if bits is None or "weight_codes" not in self._buffers:
            assert weight is not None
            return weight if bits is None else self._operand(
                weight, self.weight_scale, self.weight_zero_point, bits, "weight"
            )  # fmt: skip
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.weight_operand(
                self.weight_codes, bits, self.settings.grid, self.layer_name
            )
            return named
        decode = weight_operand if self.cache is None else self.cache.get
        return decode(self.weight_codes, bits, self.settings.grid, self.dtype)

    def keep_operand(self, enabled: bool = True) -> int:
        """Start or stop keeping the weight's operand in memory; return the number of bytes that it takes."""
        self.cache = OperandCache() if enabled and "weight_codes" in self._buffers else None
        self._renew_cache()
        return 0 if self.cache is None else self.cache.nbytes

    @property
    def is_integer(self) -> bool:
        """Whether the site's output is rounded to codes (integer deployment)."""
        return "w_factor" in self._buffers

    def integer_layer(self) -> IntegerLayer:
        """Return the numbers that integer deployment computes with; only if `is_integer`."""
        return IntegerLayer(*(self._buffers[key] for key in INTEGER_BUFFERS))  # type: ignore[arg-type] # none is None

    def hold(self, settings: Settings, name: str, dtype: torch.dtype, buffers: dict[str, Tensor]) -> None:
        """Take over the settings, dotted name, operand dtype and buffers (some of `OWN_BUFFERS`) of a frozen site."""
        self.settings, self.layer_name, self.qdq, self.dtype, self.watchers = settings, name, False, dtype, ()
        self.cache = None
        for key, value in buffers.items():
            self.register_buffer(key, value)
        self.requires_grad_(False)

    def hold_integer(self, layer: IntegerLayer) -> None:
        """Round the output to codes from now on: the numbers of `layer` replace `scale` and the bias."""
        del self._buffers["scale"]
        for key, value in zip(INTEGER_BUFFERS, layer, strict=True):
            self.register_buffer(key, value)
        if "bias" in self._parameters:
            self.register_parameter("bias", None)

    def train(self, mode: bool = True) -> FrozenSite:
        """Set evaluation mode.

        Raises:
            FrozenError: If asked for training mode.
        """
        super().train(mode)
        if mode:
            raise FrozenError(_no_training(self.layer_name))
        return self

    def _output(self, x: Tensor, w: Tensor, bias: Tensor | None, operation: Operation) -> Tensor:
        """Return the output for two operands, written into the memory of the sums if nothing else refers to it."""
        if isinstance(operation, PaddedProducts):
            x, operation = operation.pad(x), operation.products
        if self.is_integer:
            return self._integer_output(x, w, operation)
        if not self.qdq and can_fuse(operation, x, w, self.scale, bias) and only_values(x, w, self.scale, bias):
            assert isinstance(operation, KNOWN)
            return rescale_(operation(x, w), self.scale, bias, operation.output_dims)
        acc, scale = safe_products(operation, x, w, self.scale, self.settings)
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.rescale(acc, scale, bias, self.output_dims, self.layer_name)
            return named
        return rescale(acc, scale, bias, self.output_dims)

    def _integer_output(self, x: Tensor, w: Tensor, operation: Operation) -> Tensor:
        """Return the output of integer deployment in real units: `(code - zero_point) * scale`."""
        layer = self.integer_layer()
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.requantize(
                operation(x, w), self.input_scale, *layer, self.output_dims, self.layer_name
            )
            return named
        # a compiled graph cannot choose a dtype by the values, so it sums in float32 as every runtime does
        plain = torch.compiler.is_compiling() or torch.compiler.is_exporting()
        sums = exact_sums(operation, x, w, None if plain else self._sum_bound(w))
        return output_values(sums, layer, self.input_scale, self.output_dims).to(x.dtype)

    def _sum_bound(self, w: Tensor) -> int:
        """Return an upper bound of the absolute sums over all possible inputs; kept until the codes change."""
        known = self.__dict__.get("_known_bound")
        version = (id(self.weight_codes), self.weight_codes._version)
        if known is None or known[0] != version:
            top = 2 ** (self.settings.a_bits or 0) - 1
            largest = int(w.abs().reshape(w.shape[0], -1).sum(1).max()) * top if w.numel() else 0
            known = self.__dict__["_known_bound"] = (version, largest)
        return int(known[1])

    def _operand(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | None, role: str) -> Tensor:
        assert bits is not None
        if self.qdq:
            name = self.layer_name if role == "input" else f"{self.layer_name}::{role}"
            named: Tensor = torch.ops.daqconvert.input_operand(x, scale, zero_point, bits, name)
            return named
        return input_operand(x, scale, zero_point, bits)

    def _renew_cache(self) -> None:
        if self.cache is not None:
            self.cache.get(self.weight_codes, self.settings.w_bits or 0, self.settings.grid, self.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._renew_cache()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenSite:
        """Move or cast, as `.to()` and `.half()` ask; scales stay in float32 or wider, as `freeze` makes them.

        Those of an `IntegerLayer` stay in float32, because its arithmetic is defined so.
        """
        scales = {key: self._buffers[key] for key in SCALES if key in self._buffers}
        super()._apply(fn, recurse)
        for key, before in scales.items():
            after = self._buffers[key]
            kept = (torch.float16, torch.bfloat16, *([torch.float64] if key in INTEGER_BUFFERS else []))
            if before is not None and after is not None and after.dtype in kept:
                self._buffers[key] = before.to(after.device, torch.float32)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._renew_cache()
        return self


def _no_training(name: str) -> str:
    return (
        f"{name or '(root)'}: a frozen layer holds integer codes and cannot be trained. Call .eval() on the model; "
        "to train on, go back to the quantized model (or its checkpoint) and freeze it again."
    )


class OperandCache:
    """Keeps the operand of one tensor of codes. It is not a buffer, so no state dict and no file contains it.

    The cache remembers what the operand was computed from: the tensor object of the codes, its memory address, and
    torch's counter of writes into it. If any of these has changed, the operand is computed again.

    Attributes:
        kept: The codes, their state (`_state_of`) and their operand; None until the operand is computed. The tuple is
            replaced as a whole, so that threads may share it.

    Example:
        >>> cache, codes = OperandCache(), torch.tensor([0, 3], dtype=torch.uint8)
        >>> cache.get(codes, 2, "midrise", torch.float32).tolist()
        [-3.0, 3.0]
        >>> codes[0] = 1
        >>> cache.get(codes, 2, "midrise", torch.float32).tolist()
        [-1.0, 3.0]
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, tuple[object, ...], Tensor] | None = None

    def get(self, codes: Tensor, bits: int, grid: str, dtype: torch.dtype) -> Tensor:
        """Return the operand of these codes: the kept one if the codes are unchanged, else a newly computed one.

        While a model is being compiled, the kept operand is returned unchecked, because a compiled graph cannot read
        the counter of writes. Exporting, tracing and dispatch modes always decode the codes, because they have to
        record where the operand comes from.
        """
        kept = self.kept
        if torch.compiler.is_compiling():
            known = kept is not None and not torch.compiler.is_exporting()
            return kept[2] if known and kept is not None else weight_operand(codes, bits, grid, dtype)
        if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
            return weight_operand(codes, bits, grid, dtype)
        state = _state_of(codes, dtype)
        if kept is None or kept[0] is not codes or kept[1] != state:
            with torch.no_grad():
                kept = codes, state, weight_operand(codes, bits, grid, dtype)
            self.kept = kept
        return kept[2]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the kept operand; 0 if none is kept."""
        return 0 if self.kept is None else self.kept[2].nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> OperandCache:
        replica = OperandCache()
        memo[id(self)] = replica
        if self.kept is not None and self.kept[1] == _state_of(self.kept[0], self.kept[2].dtype):
            codes, operand = copy.deepcopy(self.kept[0], memo), copy.deepcopy(self.kept[2], memo)
            replica.kept = codes, _state_of(codes, operand.dtype), operand
        return replica

    def __reduce__(self) -> Any:
        return OperandCache, ()  # a file holds the codes; the operand is computed again


def _state_of(codes: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    """Return a key that changes when the codes are written to or moved, or another dtype is asked for."""
    version = None if codes.is_inference() else codes._version
    return codes.data_ptr(), codes.stride(), codes.device, version, dtype


def frozen_values(site: QuantizedSite) -> dict[str, Tensor]:
    """Return the buffers of a calibrated site's frozen form, computed from its weight and bounds."""
    values: dict[str, Tensor] = {}
    weight_quantizer, input_quantizer = site.weight_quantizer, site.input_quantizer
    with torch.no_grad():
        values["scale"] = site.sum_scale().clone()
        if isinstance(weight_quantizer, WeightQuantizer):
            weight = site.float_weight()
            assert weight is not None
            values["weight_codes"] = weight_quantizer.give_codes(weight)
        for role, quantizer in (("input", input_quantizer), ("weight", weight_quantizer)):
            if quantizer is not None and not isinstance(quantizer, WeightQuantizer):
                values[f"{role}_scale"] = quantizer.scale().clone()
                values[f"{role}_zero_point"] = quantizer.zero_point().to(torch.uint8)
    return values


def empty_values(settings: Settings, weight: Tensor, layout: ChannelLayout | None) -> dict[str, Tensor]:
    """Return buffers of the right shapes for a frozen site whose values are to be loaded.

    `layout` is None for a weight that depends on the data; then `weight` is any tensor of the right dtype and device.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=wide, device=weight.device)
    zero = torch.zeros((), dtype=torch.uint8, device=weight.device)
    per_channel = settings.granularity == "channel" and layout is not None
    values = {"scale": one.expand(layout.channels).clone() if per_channel and layout is not None else one.clone()}
    # NOTE: the keys are in the order of `frozen_values`, so that a loaded model is saved as the same bytes
    if settings.w_bits is not None and layout is not None:
        values["weight_codes"] = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    if settings.a_bits is not None:
        values |= {"input_scale": one.clone(), "input_zero_point": zero.clone()}
    if settings.w_bits is not None and layout is None:
        values |= {"weight_scale": one.clone(), "weight_zero_point": zero.clone()}
    return values


def drop_quantizers(site: Any) -> None:
    """Remove the state of a `QuantizedSite` from a module that is about to be frozen."""
    for child in ("weight_quantizer", "input_quantizer"):
        site.__dict__.pop(child, None)
        site._modules.pop(child, None)
    site.__dict__.pop("scales_channels", None)
    del site.output_scale, site.enabled
