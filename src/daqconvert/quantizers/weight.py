"""The weight quantizer: per tensor or per output channel, midrise or integer grid, normalized or in real units.

It keeps the codes of its weight as long as the values of the weight and its bounds stay the same. A 64-bit fingerprint
of these values, computed at every call at the speed of memory, notices every change: an optimizer's step,
`load_state_dict`, a write through `.data` or NumPy, a swap with an average, another module's weight. Torch's version
counter would miss some of them. Without the compiled kernels there is no cheap fingerprint, and nothing is kept.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from daqconvert.errors import ConversionError
from daqconvert.functional import weight_operator
from daqconvert.functional.codes import View, WeightCodes, attach
from daqconvert.functional.dasr import wide
from daqconvert.functional.grid import intervals, levels, quantize_weight, weight_codes, weight_scale
from daqconvert.functional.native import address, dense, kernels
from daqconvert.functional.weight_operator import QuantizedWeight, WeightGrid, weight_moments
from daqconvert.quantizers.base import FORMS, Quantizer
from daqconvert.quantizers.layout import ChannelLayout
from daqconvert.quantizers.starting import check_width, make_rounding, minimum_error_bound, normal_clip
from daqconvert.spec import Settings

GRIDS = ("midrise", "integer", "twos")  # in the order of their numbers in the saved `form`
WEIGHT_STDS = 3.0  # the paper's start of the bounds of a normalized weight


class WeightQuantizer(Quantizer):
    """Quantizes a weight to an integer-valued operand; its scale turns operands back into weights.

    With `normalize`, as in the paper, it quantizes `(W - mean(W)) / std(W)` (unbiased std, both constant for the
    gradient) on the midrise grid, with learned bounds `lower` and `upper`; its operands count in parts of full range.
    Without `normalize` it quantizes `W` itself, `lower` is `-upper`, and its operands have a scale in real units.

    Attributes:
        lower: Parameter of a normalized weight, else the buffer `-upper`; shape `(1,)` or `(C_out,)`.
        upper: Parameter of the same shape.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), equations 1-3.

    Example:
        >>> s = Settings(w_bits=4, a_bits=4, grid="integer", normalize=False, granularity="tensor")
        >>> quantizer = WeightQuantizer(s, ChannelLayout.forward((1, 3)))
        >>> weight = torch.tensor([[-0.7, 0.1, 0.69]])
        >>> quantizer.initialize(weight)
        >>> quantizer(weight).tolist()
        [[-7.0, 1.0, 7.0]]
    """

    _role = "weight"
    forms = 8 * len(GRIDS) * 4
    # hashes of the weight that the bounds belong to, and of the bounds; a model pickled by an earlier version has none
    _fitted: tuple[str, str] | None = None

    def __init__(self, settings: Settings, layout: ChannelLayout, layer_name: str = "", like: Tensor | None = None):
        super().__init__(layer_name)
        assert settings.w_bits is not None  # the layer makes no quantizer for a float weight
        self.bits = settings.w_bits
        self.grid = settings.grid
        self.normalize = settings.normalize is True
        self._memory: KnownWeight | None = None
        self.per_channel = settings.granularity == "channel"
        self.layout = layout
        self.rounding = make_rounding(settings, settings.w_gamma, settings.w_sigma, intervals(self.bits, self.grid))
        like = torch.empty(0) if like is None else like
        start = torch.ones(layout.channels if self.per_channel else 1, dtype=like.dtype, device=like.device)
        self.calibrated = self.calibrated.to(like.device)
        self._make_bounds(start)

    def _make_bounds(self, start: Tensor) -> None:
        self.upper = nn.Parameter(start * WEIGHT_STDS)
        if self.normalize:
            self.lower = nn.Parameter(start * -WEIGHT_STDS)
        else:
            self.register_buffer("lower", start * -WEIGHT_STDS)

    @property
    def form(self) -> int:
        """The number of what the bounds are the bounds of: bits, grid, normalization and granularity."""
        kind = (GRIDS.index(self.grid) * 2 + self.normalize) * 2 + self.per_channel
        return FORMS + self.bits + 8 * kind

    def form_text(self, form: int) -> str:
        """Return in words what bounds of a form are the bounds of."""
        kind, bits = divmod(form - FORMS - 1, 8)
        grid = f"{'normalized ' if kind & 2 else ''}{GRIDS[kind // 4] if kind < 12 else 'unknown'}"
        return f"w_bits = {bits + 1} ({grid}, per {'channel' if kind & 1 else 'tensor'})"

    def misfit(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Return why the entries of a state dict at `prefix` are no bounds for this quantizer; empty if they are."""
        problem = super().misfit(state_dict, prefix)
        for name, own in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if not problem and own is not None and saved is not None and saved.numel() > own.numel() == 1:
                # NOTE: torch would take the first of them without a word if the own bound has shape ()
                name = self.layer_name or "(root)"
                problem = f"{name}: {saved.numel()} bounds, one per channel, there, {self.form_text(self.form)} here"
        return problem

    def forward(self, weight: Tensor) -> Tensor:
        """Return the integer-valued operand, shape and dtype of `weight`."""
        self.require_ready()
        compiling = torch.compiler.is_compiling()
        if compiling and (torch.compiler.is_exporting() or weight.device.type != "cpu"):
            return self._plain(weight)  # this project has no kernels where the result will run
        known, key = (None, None) if compiling else self._remembered(weight)
        grid = self.weight_grid(weight, known)
        operand, codes = weight_operator.quantize_weight(weight, grid, None if known is None else known.codes)
        if compiling:
            return operand
        self._remember(known, key, codes.codes, grid)
        return attach(operand, codes)

    def _plain(self, weight: Tensor) -> Tensor:
        """Return what `forward` returns, in plain operations."""
        v = wide(weight).reshape(self.layout.view)
        mean, std = self.moments(weight)
        if mean is not None and std is not None:
            v = (v - self._expand(mean)) / self._expand(std)
        upper = self._expand(self.upper)
        lower = self._expand(self.lower) if self.normalize else -upper
        operand = quantize_weight(v, lower, upper, self.bits, self.grid, self.plain_rounding())
        return operand.reshape(weight.shape).to(weight.dtype)

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """Return the quantized weight, without gradient, for a layer whose own operator has the backward."""
        self.require_ready()
        known, key = self._remembered(weight)
        grid, stored = self.weight_grid(weight, known), None if known is None else known.codes
        operand, codes = weight_operator.forward(weight.detach(), grid, stored)
        codes = codes if stored is None else stored
        self._remember(known, key, codes, grid)
        return QuantizedWeight(grid, operand, WeightCodes(codes, self.bits, self.grid))

    def weight_grid(self, weight: Tensor, known: KnownWeight | None = None) -> WeightGrid:
        """Return how a weight is quantized; its moments are computed unless they are known."""
        mean, std = self.moments(weight) if known is None else (known.mean, known.std)
        return WeightGrid(self.own_lower, self.upper, mean, std, self.view, self.bits, self.grid, self.rounding)

    def _remembered(self, weight: Tensor) -> tuple[KnownWeight | None, tuple[object, ...] | None]:
        """Return what was kept for these values of weight and bounds, or None, and the key of the values."""
        key, memory = value_key(weight, self.own_lower, self.upper), self._memory
        return (memory if memory is not None and memory.key == key else None), key

    def _remember(
        self, known: KnownWeight | None, key: tuple[object, ...] | None, codes: Tensor, grid: WeightGrid
    ) -> None:
        if known is None:
            moments = (None if t is None else savable(t) for t in (grid.mean, grid.std))
            self._memory = None if key is None else KnownWeight(key, savable(codes), *moments)

    def take_memory(self, other: WeightQuantizer) -> None:
        """Take over the codes that another quantizer keeps of the same weight; the other one forgets them."""
        self._memory, other._memory = other._memory, None

    def give_codes(self, weight: Tensor) -> Tensor:
        """Return the codes of a weight, and do not keep them: they are the caller's. No operand is made."""
        if not self.is_plain():
            return self.codes(weight)
        self.require_ready()
        known, _ = self._remembered(weight)
        self._memory = None
        if known is not None:
            return known.codes
        return weight_operator.codes_alone(weight, self.weight_grid(weight))

    def moments(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return mean and std as the fused operator takes them; None where the weight is not normalized."""
        if not self.normalize:
            return None, None
        return weight_moments(weight, self.layout.view, self.layout.bound_view if self.per_channel else None)

    @property
    def own_lower(self) -> Tensor | None:
        """The bound `lower` of a normalized weight; None otherwise, because it is `-upper`."""
        return self.lower if self.normalize else None

    @property
    def top(self) -> int:
        """The largest operand."""
        return levels(self.bits, self.grid)

    @property
    def view(self) -> View:
        """The weight's shape as the fused operator sees it; one channel if there is one bound for all."""
        return self.layout.memory_view if self.per_channel else (1, 1, 1, math.prod(self.layout.view))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}  # a copy quantizes its weight again

    def scale(self) -> Tensor | float:
        """Return the real units per operand unit: `1 / n` (normalized), `upper / n` (midrise), else `upper / m`.

        The result is a number or of shape `()` or `(C_out,)`.
        """
        upper = self.upper if self.per_channel else self.upper.reshape(())
        return weight_scale(None if self.normalize else upper, self.top)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the stored codes `0 .. 2**bits - 1`, uint8, shape of `weight`."""
        with torch.no_grad():
            return weight_codes(self(weight), self.bits, self.grid)

    @torch.no_grad()
    def initialize(self, weight: Tensor, method: str = "mse") -> None:
        """Set the bounds from a weight: +-3 std where normalized, else minimum squared error per channel or tensor.

        Args:
            weight: The float weight.
            method: `"mse"`, or `"minmax"` for bounds at `max|W|`. A normalized weight starts the same with both.

        Raises:
            ConversionError: If the weight is empty, not finite, or constant where it must be normalized.
        """
        self.check(weight)
        self._start_bounds(weight, method)
        self.mark(True)
        self.note_fit(weight)

    def note_fit(self, weight: Tensor) -> None:
        """Remember that the bounds, as they are now, belong to this weight."""
        self._fitted = self._hashes(weight) if self._has_values(weight) else None

    def needs_fit(self, weight: Tensor) -> bool | None:
        """Whether the weight was changed from outside after the bounds were set.

        True if the weight changed and the bounds did not; False if the weight did not. None if both did, so that they
        were trained or averaged together (or trained, and then the weight was changed), or if it is not known.
        """
        if self._fitted is None or not self._has_values(weight):
            return None
        before, now = self._fitted, self._hashes(weight)
        return False if before[0] == now[0] else True if before[1] == now[1] else None

    @property
    def knows_fit(self) -> bool:
        """Whether it is known which weight the bounds belong to."""
        return self._fitted is not None

    def _has_values(self, weight: Tensor) -> bool:
        """Whether this process has all values of weight and bounds: none is on `meta`, or sharded as FSDP2 does it."""
        return not any(t.is_meta or hasattr(t, "full_tensor") for t in (weight, *self.parameters()))

    def _hashes(self, weight: Tensor) -> tuple[str, str]:
        bounds = [bound for bound in self._parameters.values() if bound is not None]
        return value_hash(weight), " ".join(map(value_hash, bounds))

    @torch.no_grad()
    def relative_error(self, weight: Tensor) -> float:
        """Return the size of the quantization error over that of the weight (normalized where it is)."""
        v = wide(weight).reshape(self.layout.view)
        mean, std = self.moments(weight)
        v = v if mean is None or std is None else (v - self._expand(mean)) / self._expand(std)
        scale = self.upper / self.top
        found = wide(self(weight)).reshape(self.layout.view) * self._expand(scale)
        return float((found - v).norm() / v.norm().clamp(min=torch.finfo(v.dtype).tiny))

    def _start_bounds(self, weight: Tensor, method: str) -> None:
        if self.normalize:
            self.upper.fill_(WEIGHT_STDS)
            self.lower.fill_(-WEIGHT_STDS)
        else:
            rows = self.layout.rows(wide(weight)) if self.per_channel else wide(weight).reshape(1, -1)
            found = minimum_error_bound(rows, self.bits, self.grid) if method == "mse" else rows.abs().amax(dim=1)
            if self.grid == "integer":
                # an all-zero channel is exact at any bound, but at 0 no gradient would ever reach it
                found = torch.where(found > 0, found, found.max() if found.any() else rows.shape[1] ** -0.5)
            self.upper.copy_(found.reshape(self.upper.shape))
            self.lower.copy_(-self.upper)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the number of bits in place, and adapt the bounds.

        A normalized weight keeps its bounds. Otherwise they are multiplied by the ratio of the bounds of least squared
        error for a normal distribution at the two numbers of bits. The caller changes the site's settings.

        Args:
            bits: 1 to 8 on the midrise grid, 2 to 8 on the others.

        Raises:
            PolicyError: If `bits` is another number.

        Example:
            >>> s = Settings(w_bits=4, grid="integer", normalize=False, granularity="tensor")
            >>> quantizer = WeightQuantizer(s, ChannelLayout.forward((1, 3)))
            >>> quantizer.initialize(torch.tensor([[-0.7, 0.1, 0.69]]))
            >>> quantizer.set_bits(2)
            >>> quantizer.bits, bool(quantizer.upper < 0.7)
            (2, True)
        """
        check_width(self.layer_name, "w_bits", bits, 1 if self.grid == "midrise" else 2)
        ready = self.ready
        self._rescale_bounds(bits)
        self.bits, self._memory = bits, None
        self.rounding = self.rounding.over(intervals(bits, self.grid))
        if ready:
            self.mark(True)

    def _rescale_bounds(self, bits: int) -> None:
        if not self.normalize:
            before, after = (normal_clip(levels(b, self.grid), self.grid == "midrise") for b in (self.bits, bits))
            self.upper.mul_(after / before)
            self.lower.copy_(-self.upper)

    @torch.no_grad()
    def check(self, weight: Tensor) -> None:
        """Raise `ConversionError` if the weight is empty, has NaN or infinities, or is constant but normalized."""
        name = self.layer_name or "(root)"
        if weight.numel() == 0:
            raise ConversionError(f"{name}: its weight of shape {tuple(weight.shape)} is empty. Exclude the layer.")
        low, high = torch.aminmax(weight)  # lets NaN through, and makes no second tensor of the weight's size
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(weight)).sum())
            raise ConversionError(
                f"{name}: {bad} of {weight.numel()} weights are NaN or infinite. Repair the checkpoint, "
                f'or leave the layer alone: exclude=["{name}"].'
            )
        if self.normalize and float(low) == float(high):
            raise ConversionError(
                f"{name}: its weight is constant ({float(low):.3g}), so (W - mean) / std is 0 / 0. "
                f'Use normalize=False for this layer, or leave it alone: exclude=["{name}"].'
            )

    def extra_repr(self) -> str:
        """Return bits, grid and granularity for `print(model)`."""
        kind = f"{self.grid}{' normalized' if self.normalize else ''}"
        return f"{self.bits} bits, {kind}, per {'channel' if self.per_channel else 'tensor'}, {self.rounding.kind}"

    def _expand(self, bound: Tensor) -> Tensor:
        return wide(bound).reshape(self.layout.bound_view if self.per_channel else ())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(prefix + name in state_dict for name in self._parameters):
            self._fitted = None  # the model notes the fit when the weight is loaded as well

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.normalize:
            with torch.no_grad():
                # NOTE: FSDP2 leaves each process a part of the bound, and buffers whole; all processes come here
                upper = self.upper.full_tensor() if hasattr(self.upper, "full_tensor") else self.upper
                self.lower.copy_(-upper)  # the buffer follows the learned bound
        super()._save_to_state_dict(destination, prefix, keep_vars)


WeightQuantizer.own_forward = WeightQuantizer.forward


def value_hash(tensor: Tensor) -> str:
    """Return a hash of the values of a tensor, in whatever order they are in memory and on whatever device.

    Example:
        >>> value_hash(torch.ones(2, 3)) == value_hash(torch.ones(3, 2).t())
        True
    """
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(plain.view(torch.uint8).numpy().data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class KnownWeight:
    """What was computed from one weight: codes and, if it is normalized, moments. Not changed: threads may share it.

    Attributes:
        key: Fingerprint of the values of the weight and its bounds, from `value_key`.
        codes: uint8.
        mean: Mean of a normalized weight, else None.
        std: Standard deviation of a normalized weight, else None.
    """

    key: tuple[object, ...]
    codes: Tensor
    mean: Tensor | None
    std: Tensor | None


def value_key(weight: Tensor, lower: Tensor | None, upper: Tensor) -> tuple[object, ...] | None:
    """Return a fingerprint of the values of a weight and its bounds, or None where there is no cheap one.

    `lower` is None where it follows from `upper`.

    Example:
        >>> weight, bound = torch.ones(3), torch.ones(())
        >>> before = value_key(weight, None, bound)
        >>> weight.data.mul_(2.0).sum().item(), before is None or value_key(weight, None, bound) != before
        (6.0, True)
    """
    library = kernels(weight, lower, upper)
    if library is None or not upper.is_contiguous() or (lower is not None and not lower.is_contiguous()):
        return None
    found = library.daq_fingerprint(
        dense(weight).data_ptr(), weight.numel(), address(lower), upper.data_ptr(), upper.numel(),
        torch.get_num_threads(),
    )  # fmt: skip
    return weight.shape, weight.stride(), found


def savable(t: Tensor) -> Tensor:
    """Return a tensor that a backward may keep: a copy of one that was made in inference mode."""
    if not t.is_inference():
        return t
    with torch.inference_mode(False):
        return t.clone()
