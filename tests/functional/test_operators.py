"""The fused operators: registered as torch wants; compiled kernels, plain torch and the reference give the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from daqconvert.errors import DaqError
from daqconvert.functional import grid, native
from daqconvert.functional.codes import expand_input, expand_weight
from daqconvert.functional.grid import Rounding
from daqconvert.functional.input_operator import InputGrid, quantize_input
from daqconvert.functional.weight_operator import WeightGrid, quantize_weight

ROUNDINGS = {
    "daq": Rounding.make("daq", 2.0, 1.0, False),
    "unit": Rounding.make("daq", 2.0, 0.5, True),
    "wide": Rounding.make("daq", 2.0, 50.0, False),
    "ste": Rounding.make("ste", 2.0, 1.0, False),
    "ewgs": Rounding.ewgs(0.7, 3),
    "dsq": Rounding.dsq(0.2),
    "steep dsq": Rounding.dsq(0.001),
}
INPUTS = {
    "unsigned": (0.0, 2.1),
    "signed": (-1.3, 2.1),
    "no width": (0.0, 0.0),
    "crossed": (0.4, -0.2),
}
VIEWS = {
    "linear": ((6, 40), (1, 1, 6, 40)),
    "convolution": ((5, 3, 3, 3), (1, 1, 5, 27)),
    "transposed": ((4, 3, 2, 2), (2, 2, 3, 4)),
    "one bound": ((5, 3, 3, 3), (1, 1, 1, 135)),
    "large": ((3, 20000), (1, 1, 3, 20000)),
}
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS.keys())


@pytest.fixture
def plain(monkeypatch):
    """Switch the compiled kernels off while it is called."""

    def without(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*args)

    return without


def leaf(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values).clone().requires_grad_()


def on_the_levels(shape: tuple[int, ...], scale: float) -> Tensor:
    """Random values, some exactly on levels, half way between them, on the bounds, at zero of both signs."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2
    x.view(-1)[:40] = torch.arange(-20, 20) * 0.5 * scale
    x.view(-1)[40:42] = torch.tensor([0.0, -0.0])
    return x


def run_input(x, lower, upper, bits, rounding):
    leaves = leaf(x), leaf(lower), leaf(upper)
    operand, codes, scale, zero_point = quantize_input(leaves[0], InputGrid(*leaves[1:], bits, rounding), codes=True)
    ((operand * torch.cos(x * 7)).sum() + 3 * scale).backward()
    return (operand, codes, scale, zero_point), [t.grad for t in leaves]


def run_reference(x, lower, upper, bits, rounding):
    leaves = leaf(x), leaf(lower), leaf(upper)
    scale = grid.input_scale(*leaves[1:], bits)
    zero_point = grid.input_zero_point(leaves[1], scale, bits)
    operand = grid.quantize_input(leaves[0], scale, zero_point, bits, rounding)
    ((operand * torch.cos(x * 7)).sum() + 3 * scale).backward()
    return (operand, (operand + zero_point).to(torch.uint8), scale, zero_point), [t.grad for t in leaves]


def agree(found, expected):
    """Values exactly, the gradient elementwise nearly, its sums (for the bounds) within 1e-5 of what they sum."""
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(found[1][0], expected[1][0], rtol=2e-6, atol=1e-7)
    summed = float(expected[1][0].abs().sum())
    for a, b in zip(found[1][1:], expected[1][1:], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * summed), (a, b)


@each_rounding
@pytest.mark.parametrize("bounds", INPUTS.values(), ids=INPUTS.keys())
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_input_kernel_plain_and_reference_agree(bits, bounds, rounding, plain):
    x = on_the_levels((3, 70, 100), max(bounds[1] - bounds[0], 0.1) / (2**bits - 1))
    lower, upper = map(torch.tensor, bounds)
    expected = run_reference(x, lower, upper, bits, rounding)
    agree(run_input(x, lower, upper, bits, rounding), expected)
    agree(plain(run_input, x, lower, upper, bits, rounding), expected)


def run_weight(weight, lower, upper, mean, std, view, bits, name, rounding):
    leaves = leaf(weight), None if lower is None else leaf(lower), leaf(upper)
    operand, codes = quantize_weight(leaves[0], WeightGrid(*leaves[1:], mean, std, view, bits, name, rounding))
    (operand * torch.cos(weight * 7)).sum().backward()
    return (operand, codes.codes), [None if t is None else t.grad for t in leaves]


def run_weight_reference(weight, lower, upper, mean, std, view, bits, name, rounding):
    leaves = leaf(weight), None if lower is None else leaf(lower), leaf(upper)
    shape = (view[0], 1, view[2], 1)
    v = leaves[0].reshape(view)
    if mean is not None:
        v = (v - mean.reshape(shape)) / std.reshape(shape)
    high = leaves[2].reshape(shape)
    low = -high if lower is None else leaves[1].reshape(shape)
    operand = grid.quantize_weight(v, low, high, bits, name, rounding).reshape(weight.shape)
    (operand * torch.cos(weight * 7)).sum().backward()
    return (operand, grid.weight_codes(operand, bits, name)), [None if t is None else t.grad for t in leaves]


@each_rounding
@pytest.mark.parametrize("layout", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize(
    ("name", "normalize", "bits"),
    [
        ("midrise", True, 1),
        ("midrise", True, 4),
        ("midrise", False, 1),
        ("midrise", False, 3),
        ("integer", False, 8),
        ("twos", False, 3),
    ],
)
def test_weight_kernel_plain_and_reference_agree(name, normalize, bits, layout, rounding, plain):
    shape, view = layout
    channels = view[0] * view[2]
    weight = on_the_levels(shape, 0.3)
    upper = torch.linspace(0.9, 2.0, channels)
    rows = weight.reshape(view).transpose(1, 2).reshape(channels, -1)
    lower, mean, std = (-upper * 1.1, rows.mean(1), rows.std(1)) if normalize else (None, None, None)
    arguments = weight, lower, upper, mean, std, view, bits, name, rounding
    expected = run_weight_reference(*arguments)
    agree(run_weight(*arguments), expected)
    agree(plain(run_weight, *arguments), expected)


def test_codes_give_the_operand_back():
    x, weight = torch.randn(7, 33), torch.randn(4, 3, 2)
    bounds = InputGrid(torch.tensor(-1.0), torch.tensor(2.0), 5, ROUNDINGS["ste"])
    operand, codes, _, zero_point = quantize_input(x, bounds, True)
    assert torch.equal(expand_input(codes, zero_point), operand)
    view = (1, 1, 4, 6)
    weight_grid = WeightGrid(None, torch.ones(4), None, None, view, 3, "midrise", ROUNDINGS["ste"])
    operand, codes = quantize_weight(weight, weight_grid)
    assert torch.equal(expand_weight(codes, view, None, torch.float32), operand)
    scale = torch.rand(4)
    assert torch.equal(expand_weight(codes, view, scale, torch.float32), operand * scale.reshape(4, 1, 1))
    again, known = quantize_weight(weight, weight_grid, codes.codes)
    assert torch.equal(again, operand) and known.codes is codes.codes


@pytest.mark.parametrize("change", [torch.Tensor.half, torch.Tensor.bfloat16])
def test_narrow_types_compute_in_float32(change):
    x, lower, upper = change(torch.randn(50)), torch.tensor(-1.0), torch.tensor(1.0)
    operand, _, scale, _ = quantize_input(x, InputGrid(change(lower), change(upper), 4, ROUNDINGS["daq"]))
    wide = quantize_input(x.float(), InputGrid(lower, upper, 4, ROUNDINGS["daq"]))[0]
    assert operand.dtype == x.dtype and scale.dtype == torch.float32
    assert torch.equal(operand.float(), wide)


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 2),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
    ],
    ids=["channels_last", "transposed", "every second", "expanded"],
)
def test_any_layout(layout, plain):
    x = layout(torch.randn(4, 6, 5, 3))
    arguments = x, torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"]
    agree(run_input(*arguments), plain(run_input, *arguments))
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    arguments = weight, None, torch.linspace(1, 2, 6), None, None, (1, 1, 6, 36), 4, "integer", ROUNDINGS["daq"]
    agree(run_weight(*arguments), plain(run_weight, *arguments))


def test_nan_stays_nan_and_has_no_gradient(plain):
    x = torch.tensor([float("nan"), 1.0, float("inf"), -float("inf")])
    for run in (run_input, lambda *a: plain(run_input, *a)):
        (operand, *_), (grad, *_) = run(x.nan_to_num(0.5), torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"])
        operand = quantize_input(x, InputGrid(torch.tensor(-1.0), torch.tensor(1.5), 4, ROUNDINGS["daq"]))[0]
        assert operand.isnan().tolist() == [True, False, False, False] and grad.isfinite().all()


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    operand = quantize_input(x, InputGrid(torch.tensor(0.0), torch.tensor(1.0), 4, ROUNDINGS["daq"]))[0]
    (grad,) = torch.autograd.grad(operand.sum(), x, create_graph=True)
    with pytest.raises(DaqError, match="no second derivative"):
        grad.sum().backward()


def samples():
    """One call of each operator, as `torch.library.opcheck` wants them."""
    operators = torch.ops.daqconvert
    constants = 4, 1, 1.0, 4.0
    x, low, high = torch.randn(3, 4, requires_grad=True), leaf(-1.0), leaf(1.5)
    scale, zero = torch.tensor(0.2), torch.tensor(6.0)
    yield operators.quantize_input.default, (x, low, high, *constants, True)
    yield operators.quantize_input.default, (x, low, high, *constants, False)
    detached = [t.detach() for t in (x, low, high)]
    yield operators.quantize_input_backward.default, (torch.ones(3, 4), scale, *detached, scale, zero, *constants)
    weight, upper = torch.randn(3, 4, requires_grad=True), leaf(torch.ones(3))
    last = [1, 1, 3, 4], 4, "integer", 1, 1.0, 4.0
    yield operators.quantize_weight.default, (weight, None, upper, None, None, None, *last)
    mean, std = torch.zeros(3), torch.ones(3)
    yield (
        operators.quantize_weight.default,
        (weight, leaf(-torch.ones(3)), upper, mean, std, None, [1, 1, 3, 4], 4, "midrise", 1, 1.0, 4.0),
    )
    values = weight.detach(), None, upper.detach(), None, None
    yield operators.quantize_weight_backward.default, (torch.ones(3, 4), *values, *last)
    bounds = *detached[1:], None, upper.detach(), None, None
    both = [1, 1, 3, 4], 4, 4, "integer"
    slopes = torch.tensor((1.0, 4.0), dtype=torch.float64), torch.tensor((1.0, 4.0), dtype=torch.float64)
    yield operators.layer_forward.default, (weight.detach(), std, *bounds, *both)
    tensors = torch.ones(3, 3), detached[0], weight.detach(), std
    yield operators.layer_backward.default, (*tensors, *bounds, *slopes, [], True, True, *both, 1, 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check reads it
@pytest.mark.parametrize("index", range(8))
def test_registered_as_torch_wants_it(index):
    operator, arguments = next(itertools.islice(samples(), index, None))
    torch.library.opcheck(operator, arguments)


def test_samples_are_all_tested():
    assert len(list(samples())) == 8


def test_fake_tensors_have_the_right_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
        bounds = InputGrid(torch.zeros(()), torch.ones(()), 4, ROUNDINGS["ste"])
        operand, codes, scale, _ = quantize_input(x, bounds, True)
        assert operand.stride() == codes.stride() == x.stride() and codes.dtype == torch.uint8 and scale.shape == ()
        weight_grid = WeightGrid(None, torch.ones(3), None, None, (1, 1, 3, 8), 4, "integer", ROUNDINGS["ste"])
        operand, codes = quantize_weight(torch.empty(3, 8), weight_grid)
        assert operand.shape == codes.codes.shape == (3, 8)
