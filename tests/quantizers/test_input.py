"""The input quantizer: signs, zero points and codes by hand and against ONNX's formula; bounds it has to refuse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daqconvert.errors import CalibrationError, ConversionError
from daqconvert.quantizers import InputQuantizer
from daqconvert.quantizers.input import SymmetricInputQuantizer
from daqconvert.quantizers.making import make_input_quantizer
from daqconvert.spec import Settings


def quantizer(bits, lower, upper, signed=None):
    made = InputQuantizer(Settings(a_bits=bits), signed, "stem")
    made.set_bounds(lower, upper)
    return made


def test_unsigned_by_hand():
    made = quantizer(2, 0.0, 1.5, signed=False)
    x = torch.tensor([-3.0, -0.1, 0.0, 0.24, 0.26, 0.25, 0.75, 1.25, 1.4, 99.0, float("inf")])
    assert made(x).tolist() == [0, 0, 0, 0, 1, 0, 2, 2, 3, 3, 3]  # ties to the even code
    assert float(made.zero_point()) == 0 and made.codes(x).tolist() == made(x).tolist()


def test_signed_by_hand():
    made = quantizer(2, -1.0, 2.0)
    assert made.sign is True and made.scale().item() == 1.0 and float(made.zero_point()) == 1
    x = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.5, 2.0, 9.0])
    assert made(x).tolist() == [-1, -1, 0, 0, 0, 2, 2, 2]
    assert made.codes(x).tolist() == [0, 0, 1, 1, 1, 3, 3, 3]


@given(
    bits=st.integers(2, 8),
    lower=st.floats(-50, -0.125, width=32),
    upper=st.floats(0, 50, width=32),
    x=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
)
@settings(max_examples=200, deadline=None)
def test_codes_are_those_of_onnx(bits, lower, upper, x):
    """`QuantizeLinear`: saturate(round_half_even(x / scale) + zero_point), in float32, here with n instead of 255."""
    made, x, n = quantizer(bits, lower, upper), torch.tensor(x), 2**bits - 1
    scale, zero_point = made.scale().detach(), made.zero_point()
    assert 0 <= float(zero_point) <= n and float(zero_point) == round(float(zero_point))
    expected = (torch.round(x / scale) + zero_point).clamp(0, n)
    assert torch.equal(made.codes(x).float(), expected)
    assert torch.equal(made(x), expected - zero_point)
    assert not made(torch.zeros(3)).any()


def test_a_range_on_one_side_of_zero():
    below = quantizer(4, -3.0, 0.0)
    assert float(below.zero_point()) == 15 and below(torch.tensor([-3.0, 0.0, 5.0])).tolist() == [-15, 0, 0]
    above = quantizer(4, 0.0, 3.0, signed=True)
    assert float(above.zero_point()) == 0 and above(torch.tensor([-3.0, 3.0])).tolist() == [0, 15]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    made = quantizer(8, -1.0, 1.0)
    x = torch.linspace(-1.2, 1.2, 301, dtype=dtype)
    assert made(x).dtype == dtype
    assert torch.equal(made(x).double(), made(x.double()))  # operands up to 255 are exact in every dtype
    assert made.codes(x).dtype == torch.uint8


@pytest.mark.parametrize(
    ("signed", "lower", "upper", "message"),
    [
        (None, 1.0, 2.0, "lower <= 0 <= upper"),
        (None, -2.0, -1.0, "lower <= 0 <= upper"),
        (None, 0.0, 0.0, "not equal"),
        (None, float("nan"), 1.0, "lower <= 0 <= upper"),
        (None, 0.0, float("inf"), "lower <= 0 <= upper"),
        (None, 0.0, float("nan"), "lower <= 0 <= upper"),
        (False, -1.0, 1.0, "unsigned"),
    ],
)
def test_bounds_that_cannot_be(signed, lower, upper, message):
    made = InputQuantizer(Settings(a_bits=4), signed, "stem")
    with pytest.raises(CalibrationError, match=f"stem: .*{message}"):
        made.set_bounds(lower, upper)
    assert not made.ready and made.sign is signed


def test_one_bit_cannot_be_signed():
    made = InputQuantizer(Settings(a_bits=1), None, "stem")
    with pytest.raises(CalibrationError, match=r"signed inputs need 2 bits or more.*a_bits"):
        made.set_bounds(-1.0, 1.0)
    made.set_bounds(0.0, 1.0)
    assert made.sign is False and made(torch.tensor([-1.0, 0.4, 0.6])).tolist() == [0, 0, 1]


def test_the_sign_is_decided_once():
    made = quantizer(4, 0.0, 1.0)
    assert made.sign is False and made.lower.requires_grad
    with pytest.raises(CalibrationError, match="unsigned"):
        made.set_bounds(-1.0, 1.0)
    made = quantizer(4, -1.0, 1.0)
    made.set_bounds(0.0, 2.0)
    assert made.sign is True and made.lower.requires_grad


def test_a_placeholder_leaves_the_sign_open():
    made = InputQuantizer(Settings(a_bits=4), None)
    made.set_placeholder()
    assert made.sign is None and made.ready and int(made.signed) == -1
    assert made(torch.tensor([-0.8, 0.0, 0.8])).tolist() == [-6.0, 0.0, 6.0]
    made.set_bounds(0.0, 1.0)
    assert made.sign is False
    one_bit = InputQuantizer(Settings(a_bits=1), None)
    one_bit.set_placeholder()
    assert one_bit(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]


def test_learned_bounds_that_cross_zero_keep_it_inside():
    made = quantizer(4, -1.0, 1.0)
    made.lower.data.fill_(0.3)
    assert float(made.zero_point()) == 0 and made(torch.tensor([-1.0, 0.0])).tolist() == [0, 0]
    made.upper.data.fill_(-0.3)
    assert made(torch.tensor([-1.0, 0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("sign", [None, False, True])
def test_the_sign_travels_in_the_state_dict(sign):
    made, other = InputQuantizer(Settings(a_bits=4), sign), InputQuantizer(Settings(a_bits=4), None)
    if sign is not None:
        made.set_bounds(-1.0 if sign else 0.0, 2.0)
    other.load_state_dict(made.state_dict())
    assert other.sign is sign and other.ready is made.ready and other.lower.requires_grad
    assert made.state_dict().keys() == {"lower", "upper", "calibrated", "signed"}
    assert made.signed.dtype == torch.int8 and made.calibrated.dtype == torch.float32  # an average can hold it


OPTIMIZERS = {
    "decay and momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9),
    "adadelta": lambda p: torch.optim.Adadelta(p),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_lower_bound_of_an_unsigned_input_stays_zero_although_it_is_a_parameter(make):
    made = InputQuantizer(Settings(a_bits=4), None)
    optimizer = make(made.parameters())  # before the sign is known
    assert all(p.requires_grad and p.shape == (1,) for p in made.parameters())
    made.set_bounds(0.0, 1.0)
    for _ in range(3):
        optimizer.zero_grad()
        made(torch.tensor([-1.0, 0.3, 2.0])).sum().backward()
        assert made.lower.grad.tolist() == [0.0] and made.upper.grad.any()  # 0, and not None: DDP waits for it
        optimizer.step()
    assert made.lower.tolist() == [0.0] and float(made.upper.detach()) != 1.0


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
def test_an_unsigned_input_does_not_read_what_an_optimizer_made_of_lower(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr("daqconvert.functional.input_operator.kernels", lambda *tensors: None)
    made, x = quantizer(4, 0.0, 1.5), torch.tensor([-1.0, 0.3, 2.0])
    expected, scale = made(x), made.scale()
    made.lower.data.fill_(-0.7)  # momentum of a time when the input was signed, for example
    assert torch.equal(made(x), expected) and torch.equal(made.scale(), scale) and float(made.zero_point()) == 0.0
    (made(x).sum() + made.scale()).backward()
    assert made.lower.grad.tolist() == [0.0]
    again = torch.autograd.grad(made.scale(), [made.lower, made.upper])
    assert [g.tolist() for g in again] == [[0.0], [pytest.approx(1 / 15)]]


def test_a_state_dict_with_scalar_bounds_loads():
    made = quantizer(4, -1.0, 2.0)
    earlier = {key: value.reshape(()) for key, value in made.state_dict().items()}
    other = InputQuantizer(Settings(a_bits=4), None)
    other.load_state_dict(earlier)
    assert other.lower.shape == (1,) and other.lower.tolist() == [-1.0] and other.sign is True


def symmetric(bits, signed=True, dtype=torch.float64, **settings):
    return SymmetricInputQuantizer(
        Settings(a_bits=bits, symmetric=True, **settings), signed, like=torch.empty(0, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_zero_point_of_a_symmetric_input_is_the_middle_code_whatever_is_learned(bits, dtype):
    made, half = symmetric(bits, dtype=dtype), 2 ** (bits - 1)
    for upper in (1.0, 0.3, 123.4, 7e-3, 0.0, -2.0):  # also bounds that have died in training
        made.set_bounds(-1.0, 1.0)
        made.upper.data.fill_(upper)
        assert float(made.zero_point()) == half
    made.set_bounds(-2.0, 1.5)
    assert made.codes(torch.tensor([-1e3, 0.0, 1e3], dtype=dtype)).tolist() == [0, half, 2 * half - 1]


def test_symmetric_bounds_include_those_that_were_found():
    made = symmetric(3)
    made.set_bounds(-1.0, 6.0)
    assert (made.lower.item(), made.upper.item(), made.scale().item()) == (-8.0, 6.0, 2.0)
    made.set_bounds(-12.0, 6.0)
    assert (made.lower.item(), made.upper.item(), made.scale().item()) == (-12.0, 9.0, 3.0)


@pytest.mark.parametrize("rounding", ["daq", "ste", "ewgs", "dsq"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_of_a_symmetric_bound_is_that_of_both_ends(bits, rounding):
    """`lower = -upper * Q_n / Q_p`, so `d/d upper` is that of a quantizer with two bounds, by the chain rule."""
    x = torch.randn(500, dtype=torch.float64)
    made = symmetric(bits, rounding=rounding)
    both = InputQuantizer(Settings(a_bits=bits, rounding=rounding), True, like=x)
    made.set_bounds(-1.0, 1.0)
    both.set_bounds(made.lower.item(), made.upper.item())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    weights = torch.randn_like(x)
    for quantizer, of in zip((made, both), inputs, strict=True):
        (quantizer(of) * quantizer.scale() * weights).sum().backward()
    ratio = 2 ** (bits - 1) / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(made.upper.grad, both.upper.grad - ratio * both.lower.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-12)
    if rounding == "ste":  # by hand: d(scale * operand)/d scale is operand - x / scale inside, operand outside
        scale = made.scale().detach()
        operand, levels = made(x).detach(), x / scale
        inside = (levels > operand.min()) & (levels < operand.max())
        by_hand = (weights * torch.where(inside, operand - levels, operand)).sum() / (2 ** (bits - 1) - 1)
        torch.testing.assert_close(made.upper.grad, by_hand.reshape(1), rtol=1e-6, atol=1e-9)
    assert made.upper.grad.abs() > 0


def test_a_dead_symmetric_bound_still_learns():
    made = symmetric(4, rounding="ste")
    made.set_bounds(-1.0, 1.0)
    made.upper.data.fill_(-0.5)
    (made(torch.ones(3, dtype=torch.float64)) * made.scale()).sum().backward()
    assert made.upper.grad.item() > 0  # a larger bound gives a larger value


@pytest.mark.parametrize("rounding", ["daq", "lsq"])
@pytest.mark.parametrize("role", ["input", "weight"])
def test_a_symmetric_operand_of_eight_bits_is_signed(role, rounding):
    settings = Settings(8, 8, symmetric=True, rounding=rounding)
    made = make_input_quantizer(settings, None, "", torch.empty(0), role)
    assert made.sign is True
    made.set_bounds(0.0, 1.27)
    assert made.codes(torch.tensor([0.0, 1.27])).tolist() == [128, 255]
    seven = make_input_quantizer(settings.replace(w_bits=7, a_bits=7), None, "", torch.empty(0), role)
    seven.set_bounds(0.0, 1.27)
    assert seven.sign is False and seven.codes(torch.tensor([0.0, 1.27])).tolist() == [0, 127]


def test_bounds_of_a_symmetric_input_are_not_taken_for_others():
    other = InputQuantizer(Settings(a_bits=4), True)
    other.set_bounds(-1.0, 2.0)
    made = symmetric(4, dtype=torch.float32)
    with pytest.raises(ConversionError, match=r"a_bits = 4 there, a_bits = 4, symmetric here"):
        made.load_state_dict(other.state_dict())
    made.set_bounds(-1.0, 2.0)
    with pytest.raises(ConversionError, match=r"a_bits = 4, symmetric there, a_bits = 4 here"):
        other.load_state_dict(made.state_dict())
    fresh = symmetric(4, dtype=torch.float32, signed=None)
    fresh.load_state_dict(made.state_dict())
    assert fresh.ready and fresh.sign is True and torch.equal(fresh.scale(), made.scale())
