"""The state that every frozen site shares: uint8 codes instead of a weight, scales instead of bounds.

A frozen weight's integer-valued operand, kept in memory: 4 bytes a weight beside the 1 of its code.

It is no buffer: it stands in no state dict and no file. What it was computed from is known - the very tensor of codes,
where it lies, and torch's counter of writes into it - so it is computed again after any of them has changed.

The forward of a frozen layer in integer deployment: exact sums, then the codes of its output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import FrozenError
from daqconvert.functional.inference import decoded_weight, input_operand, only_values
from daqconvert.functional.integer import IntegerLayer, requantized
from daqconvert.functional.product_operator import can_fuse, rescale_
from daqconvert.functional.products import KNOWN, PaddedProducts
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, rescale, safe_products
from daqconvert.quantizers import ChannelLayout, WeightQuantizer
from daqconvert.spec import Settings

INTEGER_BUFFERS = ("w_scale", "w_factor", "bias_codes", "y_scale", "y_zero_point", "y_range")
"""Where a site keeps the numbers of its `IntegerLayer`, in that order."""

EXACT = 2**24
"""From here on not every integer is a float32."""


def numbers_of(site: Any) -> IntegerLayer:
    """Return the numbers of a frozen site of integer deployment.

    Args:
        site: The site.
    """
    return IntegerLayer(*(site._buffers[key] for key in INTEGER_BUFFERS))


def integer_output(site: Any, operation: Operation, operand: Tensor, weight: Tensor) -> Tensor:
    """Return a layer's output on its grid, `(code - zero_point) * scale`.

    Args:
        site: Of integer deployment.
        operation: The bare products.
        operand: Of the input, integer-valued.
        weight: Operand of the weight, integer-valued.
    """
    numbers = numbers_of(site)
    if isinstance(operation, PaddedProducts):
        operand, operation = operation.pad(operand), operation.products
    if site.qdq:
        found: Tensor = torch.ops.daqconvert.requantize(
            operation(operand, weight), site.input_scale, *numbers, site.output_dims, site.layer_name
        )
        return found
    products = int32_products if _REFERENCE else exact_products
    sums = products(operation, operand, weight, site)
    return requantized(sums, numbers, site.input_scale, site.output_dims).to(operand.dtype)


def exact_products(operation: Operation, x: Tensor, w: Tensor, site: Any) -> Tensor:
    """Return `operation(x, w)` exactly: in float32 below 2**24, in parts of the channels or in float64 above.

    Args:
        operation: The bare products.
        x: Integer-valued operand of the input.
        w: Integer-valued operand of the weight.
        site: Whose bits say how large a sum may be.
    """
    x, w = x.float(), w.float()
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return operation(x, w)
    largest = _largest_sum(site, w)
    if largest < EXACT:
        return operation(x, w)
    channels, parts = w.shape[1] if w.dim() > 1 else 0, -(-largest // (EXACT - 1))
    channel_of_x = -1 if w.dim() == 2 else 1
    if channels < parts or x.shape[channel_of_x] != channels:
        return operation(x.double(), w.double())
    pieces = zip(x.chunk(parts + 1, channel_of_x), w.chunk(parts + 1, 1), strict=True)
    total: Tensor | None = None
    for piece_x, piece_w in pieces:
        part = operation(piece_x, piece_w).to(torch.int32)
        total = part if total is None else total + part
    assert total is not None
    return total


def int32_products(operation: Operation, x: Tensor, w: Tensor, site: Any) -> Tensor:
    """Return `operation(x, w)` computed in int32, in int64 where torch has no such kernel (dilated convolutions).

    Args:
        operation: The bare products.
        x: Integer-valued operand of the input.
        w: Integer-valued operand of the weight.
        site: Not used.
    """
    try:
        return operation(x.to(torch.int32), w.to(torch.int32))
    except (NotImplementedError, RuntimeError):
        return operation(x.to(torch.int64), w.to(torch.int64))


def _largest_sum(site: Any, w: Tensor) -> int:
    """The largest sum that these weights can make of any input: remembered, for the codes of a frozen site stay."""
    known = site.__dict__.get("_largest_sum")
    codes = site._buffers["weight_codes"]
    version = (id(codes), codes._version)
    if known is None or known[0] != version:
        top = 2 ** (site.settings.a_bits or 0) - 1
        largest = int(w.abs().reshape(w.shape[0], -1).sum(1).max()) * top if w.numel() else 0
        known = site.__dict__["_largest_sum"] = (version, largest)
    return int(known[1])


_REFERENCE = False


@contextmanager
def int32_reference() -> Iterator[None]:
    """Compute every layer of integer deployment in int32 while the context lasts: slow, and beyond doubt."""
    global _REFERENCE
    before, _REFERENCE = _REFERENCE, True
    try:
        yield
    finally:
        _REFERENCE = before


SCALES = ("scale", "input_scale", "weight_scale", "w_scale", "y_scale")
OWN_BUFFERS = ("weight_codes", "scale", "input_scale", "input_zero_point", "weight_scale", "weight_zero_point")
BUFFERS = (*OWN_BUFFERS, *INTEGER_BUFFERS)


class FrozenSite(nn.Module):
    """Mixin of everything that holds the codes and scales of a frozen site; computes, never trains.

    Attributes:
        weight_codes: uint8 buffer `0 .. 2**w_bits - 1`, shape of the weight; absent where the weight stays float or
            depends on the data.
        scale: float32 buffer, `()` or `(C_out,)`: what one unit of the integer sum is worth.
        input_scale: float32 scalar buffer; absent where the input stays float.
        input_zero_point: uint8 scalar buffer, likewise.
        weight_scale: float32 scalar buffer, for a weight that depends on the data alone.
        weight_zero_point: uint8 scalar buffer, likewise.
        settings: What the plan's row said.
        dtype: Of the operands.
        qdq: True writes operands and rescaling as one operator each (`deploy.frozen_operators`), for export alone;
            the values are the same.
        watchers: What `watching` has attached.
        cache: Keeps the operand of the codes where `keep_operand` has said so, else None.
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

    def hold(self, settings: Settings, name: str, dtype: torch.dtype, buffers: dict[str, Tensor]) -> None:
        """Take over the values of a frozen site.

        Args:
            settings: Of the plan's row.
            name: Of the site.
            dtype: Of the operands.
            buffers: Some of `BUFFERS`.
        """
        self.settings, self.layer_name, self.qdq, self.dtype, self.watchers = settings, name, False, dtype, ()
        self.cache = None
        for key, value in buffers.items():
            self.register_buffer(key, value)
        self.requires_grad_(False)

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, operation: Operation) -> Tensor:
        """Return the site's output from integer operands.

        Args:
            x: Float input.
            weight: The float weight, where there are no codes.
            bias: Or None.
            operation: The bare products.

        Raises:
            FrozenError: In training mode.
        """
        if self.training:
            raise FrozenError(no_training(self.layer_name))
        for watcher in self.watchers:
            x = watcher.before(self, x, weight, operation)
        operand = x if self.settings.a_bits is None else self.input_operand(x)
        y = self._output(operand, self.weight_operand(weight), bias, operation)
        for watcher in self.watchers:
            watcher.after(self, y)
        return y

    def _output(self, x: Tensor, w: Tensor, bias: Tensor | None, operation: Operation) -> Tensor:
        """Products of two operands, scale and bias; where the sums are surely nobody else's, in their own memory."""
        if "w_factor" in self._buffers:
            return integer_output(self, operation, x, w)
        if isinstance(operation, PaddedProducts):
            x, operation = operation.pad(x), operation.products
        if not self.qdq and can_fuse(operation, x, w, self.scale, bias) and only_values(x, w, self.scale, bias):
            assert isinstance(operation, KNOWN)
            return rescale_(operation(x, w), self.scale, bias, operation.output_dims)
        acc, scale = safe_products(operation, x, w, self.scale, self.settings)
        if self.qdq:
            named: Tensor = torch.ops.daqconvert.rescale(acc, scale, bias, self.output_dims, self.layer_name)
            return named
        return rescale(acc, scale, bias, self.output_dims, acc.dtype)

    def input_operand(self, x: Tensor) -> Tensor:
        """Return `q - zero_point` of an input, integer-valued, in its dtype."""
        return self._operand(x, self.input_scale, self.input_zero_point, self.settings.a_bits, "input")

    def input_codes(self, x: Tensor) -> Tensor:
        """Return the codes `0 .. 2**a_bits - 1` of an input, uint8."""
        return (self.input_operand(x) + self.input_zero_point).to(torch.uint8)

    def weight_operand(self, weight: Tensor | None = None) -> Tensor:
        """Return the integer-valued weight operand in the model's dtype; the weight itself where it stays float.

        Args:
            weight: The float weight, where there are no codes.
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
        decode = decoded_weight if self.cache is None else self.cache.get
        return decode(self.weight_codes, bits, self.settings.grid, self.dtype)

    def keep_operand(self, enabled: bool = True) -> int:
        """Keep the operand of the codes in memory from now on, or no longer; return the bytes it takes."""
        self.cache = OperandCache() if enabled and "weight_codes" in self._buffers else None
        self._renew()
        return 0 if self.cache is None else self.cache.nbytes

    def _renew(self) -> None:
        if self.cache is not None:
            self.cache.get(self.weight_codes, self.settings.w_bits or 0, self.settings.grid, self.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._renew()

    def _operand(self, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | None, role: str) -> Tensor:
        assert bits is not None
        if self.qdq:
            name = self.layer_name if role == "input" else f"{self.layer_name}::{role}"
            named: Tensor = torch.ops.daqconvert.input_operand(x, scale, zero_point, bits, name)
            return named
        return input_operand(x, scale, zero_point, bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenSite:
        """Move or cast, as `.to()` and `.half()` do; scales stay float32 at least, as when a half model is frozen."""
        scales = {key: self._buffers[key] for key in SCALES if key in self._buffers}
        super()._apply(fn, recurse)
        for key, before in scales.items():
            after = self._buffers[key]
            if before is not None and after is not None and after.dtype in (torch.float16, torch.bfloat16):
                self._buffers[key] = before.to(after.device, torch.float32)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._renew()
        return self

    def train(self, mode: bool = True) -> FrozenSite:
        """Set evaluation mode.

        Raises:
            FrozenError: If asked for training mode.
        """
        super().train(mode)
        if mode:
            raise FrozenError(no_training(self.layer_name))
        return self


def frozen_values(site: QuantizedSite) -> dict[str, Tensor]:
    """Return the buffers of a quantized site's frozen form, computed from its weight and bounds.

    Args:
        site: With every quantizer calibrated.
    """
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

    Args:
        settings: Of the plan's row.
        weight: The float weight, or a tensor of its dtype and device where it depends on the data.
        layout: Where its output channels are; None for a weight that depends on the data.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=wide, device=weight.device)
    zero = torch.zeros((), dtype=torch.uint8, device=weight.device)
    per_channel = settings.granularity == "channel" and layout is not None
    values = {"scale": one.expand(layout.channels).clone() if per_channel and layout is not None else one.clone()}
    # NOTE: in the order of `frozen_values`, so that a loaded model is saved as the same bytes
    if settings.w_bits is not None and layout is not None:
        values["weight_codes"] = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    if settings.a_bits is not None:
        values |= {"input_scale": one.clone(), "input_zero_point": zero.clone()}
    if settings.w_bits is not None and layout is None:
        values |= {"weight_scale": one.clone(), "weight_zero_point": zero.clone()}
    return values


def drop_quantizers(site: Any) -> None:
    """Take the state of a `QuantizedSite` off a module that is about to be frozen."""
    for child in ("weight_quantizer", "input_quantizer"):
        site.__dict__.pop(child, None)
        site._modules.pop(child, None)
    del site.output_scale, site.enabled


def no_training(name: str) -> str:
    """Return the message for a frozen site that is asked to train."""
    return (
        f"{name or '(root)'}: a frozen layer holds integer codes and cannot be trained. Call .eval() on the model; "
        "to train on, go back to the quantized model (or its checkpoint) and freeze it again."
    )


class OperandCache:
    """Holds the operand of one tensor of codes.

    Attributes:
        kept: The codes, what was known of them, and their operand; None until it is computed. Replaced as a whole, so
            that threads may share it.

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
        """Return the operand of these codes, computed if it is not that of their present values.

        A compiled model takes what is here, for it cannot ask for the counter of writes; who traces it or watches its
        operators has to see where the operand comes from.

        Args:
            codes: uint8.
            bits: 1 to 8.
            grid: `"midrise"`, `"integer"` or `"twos"`.
            dtype: Of the operand.
        """
        kept = self.kept
        if torch.compiler.is_compiling():
            known = kept is not None and not torch.compiler.is_exporting()
            return kept[2] if known and kept is not None else decoded_weight(codes, bits, grid, dtype)
        if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
            return decoded_weight(codes, bits, grid, dtype)
        state = _state_of(codes, dtype)
        if kept is None or kept[0] is not codes or kept[1] != state:
            with torch.no_grad():
                kept = codes, state, decoded_weight(codes, bits, grid, dtype)
            self.kept = kept
        return kept[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the operand."""
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
    """What changes with the values of a tensor of codes, or with the operand that is asked for."""
    version = None if codes.is_inference() else codes._version
    return codes.data_ptr(), codes.stride(), codes.device, version, dtype
