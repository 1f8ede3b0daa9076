"""The input quantizer: per tensor, unsigned or signed with an integer zero point, learned bounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daqconvert.errors import CalibrationError
from daqconvert.functional import input_operator
from daqconvert.functional.codes import InputCodes, attach
from daqconvert.functional.grid import input_scale, input_zero_point, quantize_input
from daqconvert.functional.input_operator import InputGrid
from daqconvert.quantizers.base import NEAR, Quantizer
from daqconvert.quantizers.starting import STD_CLIP, check_width, make_rounding, normal_clip
from daqconvert.spec import Settings


class InputQuantizer(Quantizer):
    """Quantizes a layer's input to the integer-valued operand `code - zero_point`.

    `scale = (upper - lower) / n`, `zero_point = clip(round(-lower / scale), 0, n)`,
    `operand = clip(round(x / scale), -zero_point, n - zero_point)`. Unsigned: `lower = 0`, so `zero_point = 0`.

    Attributes:
        lower: Parameter of shape `(1,)`; not read where the input is unsigned, its gradient is exactly 0 then.
        upper: Parameter of shape `(1,)`.
        signed: int8 buffer: 0 unsigned, 1 signed, -1 until `calibrate` decides.

    Reference: "Distance-aware Quantization" (Kim, Lee, Ham, ICCV 2021), eq. 1; zero point as in ONNX.

    Example:
        >>> quantizer = InputQuantizer(Settings(a_bits=2), signed=False)
        >>> quantizer.set_bounds(0.0, 3.0)
        >>> quantizer(torch.tensor([-1.0, 0.4, 1.6, 9.0])).tolist()
        [0.0, 0.0, 2.0, 3.0]
    """

    signed: Tensor
    forms = 16

    def __init__(
        self, settings: Settings, signed: bool | None = None, layer_name: str = "", like: Tensor | None = None,
        role: str = "input",
    ) -> None:  # fmt: skip
        super().__init__(layer_name)
        bits = settings.a_bits if role == "input" else settings.w_bits
        assert bits is not None  # the layer makes no quantizer for a float operand
        self.bits, self._role = bits, role
        self.rounding = make_rounding(settings, settings.a_gamma, settings.a_sigma, 2**bits - 1)
        like = torch.empty(0) if like is None else like
        self.calibrated = self.calibrated.to(like.device)
        self._make_bounds(torch.ones(1, dtype=like.dtype, device=like.device))
        code = -1 if signed is None else int(signed)
        self.register_buffer("signed", torch.tensor(code, dtype=torch.int8, device=like.device))
        self._sign = signed

    def _make_bounds(self, one: Tensor) -> None:
        self.lower = nn.Parameter(torch.zeros_like(one))
        self.upper = nn.Parameter(one)

    def _write_bounds(self, lower: float, upper: float) -> None:
        self.lower.fill_(lower)
        self.upper.fill_(upper)

    @property
    def sign(self) -> bool | None:
        """Whether the input is signed; None while `calibrate` has not decided."""
        self._follow()
        return self._sign

    def forward(self, x: Tensor) -> Tensor:
        """Return the integer-valued operand `code - zero_point`, shape and dtype of `x`."""
        self.require_ready()
        self._see(x)
        if torch.compiler.is_compiling():  # the compiler fuses plain operations, and cannot look into an operator
            scale = self.scale()
            return quantize_input(x, scale, self.zero_point(scale), self.bits, self.plain_rounding())
        grid = self._grid()
        operand, codes, scale, zero_point = input_operator.quantize_input(x, grid, codes=torch.is_grad_enabled())
        return attach(operand, InputCodes(codes, zero_point, scale))

    def scale(self) -> Tensor:
        """Return the real units per code, a scalar tensor that carries the bounds' gradient."""
        return input_scale(*self._ends(), self.bits, self._reads_lower())

    def grid(self, x: Tensor) -> InputGrid:
        """Return how an input `x` is quantized, for a layer that does it together with its products."""
        self.require_ready()
        self._see(x)
        return self._grid()

    def _see(self, x: Tensor) -> None:
        """Note what the bounds need to know of the input before they are used: nothing here, its size in LSQ."""

    def _grid(self) -> InputGrid:
        return InputGrid(*self._ends(), self.bits, self.rounding, self._reads_lower())

    def _ends(self) -> tuple[Tensor, Tensor]:
        """Return the bounds as they are computed with, carrying their gradient."""
        return self.lower, self.upper

    def _reads_lower(self) -> bool:
        """Whether `lower` is read and learned; if not, it stands for 0 whatever an optimizer makes of it.

        An undecided sign has placeholder bounds, which are signed where there are 2 bits or more.
        """
        return self._sign is True or (self._sign is None and self.bits > 1)

    def zero_point(self, scale: Tensor | None = None) -> Tensor:
        """Return the integer-valued zero point, a scalar tensor without gradient."""
        scale = self.scale() if scale is None else scale
        return input_zero_point(self._ends()[0], scale, self.bits, self._reads_lower())

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes `0 .. 2**bits - 1` of an input, uint8."""
        with torch.no_grad():
            return (self(x) + self.zero_point()).to(torch.uint8)

    def fit(self, lower: float, upper: float) -> tuple[float, float]:
        """Return the bounds that the quantizer takes if it is asked for these: here these, elsewhere tied ones."""
        return lower, upper

    @torch.no_grad()
    def set_bounds(self, lower: float, upper: float) -> None:
        """Set the bounds and the sign (`lower < 0` is signed), and mark the quantizer calibrated.

        Raises:
            CalibrationError: If the bounds are not finite, not ordered `lower <= 0 <= upper`, equal, negative for an
                unsigned quantizer, or signed at 1 bit.
        """
        name = self.layer_name or "(root)"
        if not (-float("inf") < lower <= 0.0 <= upper < float("inf")) or lower == upper:
            raise CalibrationError(f"{name}: expected bounds lower <= 0 <= upper, not equal; found {lower}, {upper}.")
        signed = self._sign if self._sign is not None else lower < 0.0
        if not signed and lower < 0.0:
            raise CalibrationError(f"{name}: its input is unsigned (proven, or decided before), so lower must be 0.")
        if signed and self.bits == 1:
            raise CalibrationError(
                f"{name}: its input has negative values (down to {lower:.3g}); signed inputs need 2 bits or more. "
                f'Give this layer a_bits=2: [[rule]] match = "{name}", a_bits = 2.'
            )
        self.signed.fill_(int(signed))
        self._sign = signed
        self._write_bounds(lower, upper)
        self.mark(True)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the number of bits in place, and adapt the bounds.

        The bounds are multiplied by the ratio of the best bounds at the two numbers of bits. The best bound has the
        least squared error for a normal distribution (signed) or its positive half; at 1 bit it is 3 standard
        deviations, where `calibrate` starts. The caller changes the site's settings.

        Args:
            bits: 1 to 8 (2 to 8 for a signed input).

        Raises:
            PolicyError: If `bits` is another number.

        Example:
            >>> quantizer = InputQuantizer(Settings(a_bits=8), signed=False)
            >>> quantizer.set_bounds(0.0, 3.0)
            >>> quantizer.set_bits(2)
            >>> quantizer.bits, bool(quantizer.upper < 2.0)
            (2, True)
        """
        check_width(self.layer_name, "a_bits" if self._role == "input" else "w_bits", bits, 2 if self._sign else 1)
        self._rescale_bounds(bits)
        ready = self.ready
        self.bits, self.rounding = bits, self.rounding.over(2**bits - 1)
        if ready:
            self.mark(True)

    def _rescale_bounds(self, bits: int) -> None:
        before, after = (
            STD_CLIP if b == 1 else normal_clip(2**b - 1, midrise=self._sign is True) for b in (self.bits, bits)
        )
        for bound in self.parameters():
            bound.mul_(after / before)

    @torch.no_grad()
    def set_placeholder(self) -> None:
        """Set bounds for an input that no batch reached: `[-1, 1]`, or `[0, 1]` if unsigned or of 1 bit.

        A sign that is not decided stays undecided: the next calibration that sees the input decides it.
        """
        self._write_bounds(0.0 if self._sign is False or self.bits == 1 else -1.0, 1.0)
        self.mark(True)

    @torch.no_grad()
    def forget(self, sign: bool | None) -> None:
        """Mark the bounds as never set, with the sign that the plan knows (None: `calibrate` decides again)."""
        self.signed.fill_(-1 if sign is None else int(sign))
        self._sign = sign
        self.mark(False)

    def extra_repr(self) -> str:
        """Return bits and sign for `print(model)`."""
        sign = {None: "sign undecided", True: "signed", False: "unsigned"}[self._sign]
        return f"{self.bits} bits, {sign}, {self.rounding.kind}"

    def _read_flags(self, value: float) -> None:
        super()._read_flags(value)
        self._sign = {0: False, 1: True}.get(int(self.signed))

    @torch.no_grad()
    def _settle_average(self, share: float) -> None:
        super()._settle_average(share)
        if int(self.signed) != 1:  # an average of the integers -1 (undecided) and 1 may have any value between them
            self.signed.fill_(int(bool(self.lower < -NEAR * self.upper)))


InputQuantizer.own_forward = InputQuantizer.forward


LEAST_BOUND = 1e-9  # of a tied range; it is above `TINY`


def alive(bound: Tensor) -> Tensor:
    """Return a bound of a tied range, with its gradient, or `LEAST_BOUND` if training has taken it to 0 or below.

    Between a lower and an upper bound of the wrong sign the zero point would not be in the middle.
    """
    least = max(LEAST_BOUND, torch.finfo(bound.dtype).tiny)
    return torch.where(bound >= least, bound, least + (bound - bound.detach()))


class SymmetricInputQuantizer(InputQuantizer):
    """The input quantizer for runtimes without zero points: `2**(bits - 1)` if the input is signed, 0 in int8.

        lower = -upper * Q_n / Q_p      Q_n = 2**(bits - 1), Q_p = Q_n - 1; so upper = Q_p * scale

    `upper` alone is learned, and its gradient is that of both bounds. An unsigned input is quantized as elsewhere, and
    has at most 7 bits, which its plan has to say.

    Attributes:
        upper: Parameter of shape `(1,)`.

    Example:
        >>> quantizer = SymmetricInputQuantizer(Settings(a_bits=3, symmetric=True), signed=True)
        >>> quantizer.set_bounds(-1.0, 6.0)
        >>> quantizer.lower.item(), quantizer.upper.item(), quantizer.zero_point().item()
        (-8.0, 6.0, 4.0)
        >>> quantizer(torch.tensor([-9.0, -2.2, 0.4, 9.0])).tolist()
        [-4.0, -1.0, 0.0, 3.0]
    """

    def _make_bounds(self, one: Tensor) -> None:
        self.upper = nn.Parameter(one)

    @property
    def lower(self) -> Tensor:  # type: ignore[override]
        """The lower bound, which follows from `upper` and carries its gradient; 0 if the input is unsigned."""
        return self._ends()[0]

    def _ends(self) -> tuple[Tensor, Tensor]:
        upper = self.upper
        if not self._reads_lower():
            return torch.zeros_like(upper.detach()), upper
        upper = alive(upper)
        return upper * -self._ratio(), upper

    def _ratio(self) -> float:
        """Return `Q_n / Q_p`."""
        half = 2 ** (self.bits - 1)
        return half / max(half - 1, 1)

    @property
    def form(self) -> int:
        """The number of what the bounds are the bounds of; it differs from that of two bounds."""
        return super().form + 8

    def fit(self, lower: float, upper: float) -> tuple[float, float]:
        """Return the tied bounds that include these."""
        if lower == 0.0:
            return lower, upper
        high = max(upper, -lower / self._ratio())
        return -high * self._ratio(), high

    def _write_bounds(self, lower: float, upper: float) -> None:
        self.upper.fill_(self.fit(lower, upper)[1])

    def _settle_average(self, share: float) -> None:
        Quantizer._settle_average(self, share)

    def extra_repr(self) -> str:
        """Return bits and sign for `print(model)`."""
        return f"{super().extra_repr()}, symmetric"
