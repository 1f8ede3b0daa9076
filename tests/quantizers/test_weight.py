"""The weight quantizer: grids and codes by hand, bounds near the best there are, and weights it has to refuse."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import CalibrationError, ConversionError
from daqconvert.functional.grid import Rounding, levels, quantize_weight, weight_codes, weight_operand
from daqconvert.quantizers import ChannelLayout, WeightQuantizer
from daqconvert.quantizers.starting import minimum_error_bound
from daqconvert.spec import Settings


def quantizer(weight, **settings):
    plain = {"w_bits": 4, "grid": "integer", "normalize": False, "granularity": "tensor"}
    made = WeightQuantizer(
        Settings(**plain | settings), ChannelLayout.forward(tuple(weight.shape)), "layer1.conv", weight
    )
    made.initialize(weight)
    return made


def values(made, weight):
    return made(weight) * made.scale()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_integer_grid_is_symmetric_and_holds_zero(bits):
    top = 2 ** (bits - 1) - 1
    weight = torch.tensor([[*(2.0 * i / top for i in range(-top, top + 1)), 5.0, -5.0, -0.0]])
    made = quantizer(weight, w_bits=bits)
    made.upper.data.fill_(2.0)
    assert made(weight).tolist() == [[*range(-top, top + 1), top, -top, 0]]
    assert made.codes(weight).tolist() == [[*range(2 * top + 1), 2 * top, 0, top]]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("normalize", [True, False])
def test_the_midrise_grid_holds_odd_multiples(bits, normalize):
    n = 2**bits - 1
    weight = torch.randn(4, 300)
    made = quantizer(weight, w_bits=bits, grid="midrise", normalize=normalize)
    operand = made(weight)
    assert set(operand.unique().tolist()) <= set(range(-n, n + 1, 2))
    assert torch.equal(operand, 2.0 * made.codes(weight) - n)
    if bits == 1:
        assert torch.equal(operand, (weight - normalize * weight.mean()).sign())


@pytest.mark.parametrize(
    ("bits", "grid"), [(b, g) for b in range(1, 9) for g in ("midrise", "integer", "twos") if b > 1 or g == "midrise"]
)
def test_codes_and_operands_are_inverse(bits, grid):
    codes = torch.arange(2**bits - 1 if grid == "integer" else 2**bits, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        operand = weight_operand(codes, bits, grid, dtype)
        assert operand.dtype == dtype and torch.equal(weight_codes(operand, bits, grid), codes)
        assert float(operand.max()) == levels(bits, grid) == -float(operand.min()) - (grid == "twos")


def test_ties_go_to_the_even_level():
    half = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    one = torch.tensor(7.0)
    found = quantize_weight(half, -one, one, 4, "integer", Rounding("ste"))
    assert found.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0]]
    codes = quantize_weight(half, torch.tensor(0.0), torch.tensor(15.0), 4, "midrise", Rounding("ste"))
    assert codes.tolist() == [[-15.0, -11.0, -11.0, -15.0, -15.0]]


def test_normalized_weights_by_hand():
    weight = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    made = quantizer(weight, w_bits=2, grid="midrise", normalize=True)
    v = (weight - 3.0) / torch.tensor([4.0, 1.0, 0.0, 9.0]).sum().div(3).sqrt()  # unbiased
    expected = 2 * torch.round((v + 3) / 2) - 3
    assert torch.equal(made(weight), expected) and made.lower.item() == -3 and made.upper.item() == 3
    assert made.scale() == 1 / 3


def test_per_channel_moments_and_bounds():
    weight = torch.randn(3, 50) * torch.tensor([[0.1], [1.0], [10.0]]) + torch.tensor([[0.0], [5.0], [-7.0]])
    together = quantizer(weight, w_bits=3, grid="midrise", normalize=True, granularity="channel")
    for channel in range(3):
        alone = quantizer(weight[channel : channel + 1], w_bits=3, grid="midrise", normalize=True)
        assert torch.equal(together(weight)[channel], alone(weight[channel : channel + 1])[0])
    plain = quantizer(weight, w_bits=4, granularity="channel")
    assert plain.upper.shape == plain.lower.shape == (3,)
    for channel in range(3):
        alone = quantizer(weight[channel : channel + 1], w_bits=4)
        assert plain.upper[channel] == alone.upper


def test_the_lower_bound_on_disk_follows_upper():
    made = quantizer(torch.randn(2, 9), granularity="channel")
    made.upper.data.mul_(1.7)
    assert torch.equal(made.state_dict()["lower"], -made.upper)
    assert "lower" not in dict(made.named_parameters())


def test_degenerate_channels():
    weight = torch.randn(4, 9)
    weight[0], weight[1], weight[2] = 0.0, 0.25, -3.0
    for bits in range(1, 9):
        for settings in ({"grid": "midrise", "normalize": True}, {"grid": "midrise"}, {"grid": "integer"}):
            if bits == 1 and settings["grid"] == "integer":
                continue
            made = quantizer(weight, w_bits=bits, granularity="channel", **settings)
            found = made(weight)
            assert found.isfinite().all() and found[1].unique().numel() == found[2].unique().numel() == 1
            assert (found[1] > 0).all() and (found[2] < 0).all()
            if not made.normalize:
                torch.testing.assert_close((found * made.scale()[:, None])[:3], weight[:3])


def test_a_weight_of_one_element_per_channel():
    weight = torch.tensor([[2.0], [-0.5], [0.0]])
    made = quantizer(weight, w_bits=2, grid="midrise", normalize=True, granularity="channel")
    assert made(weight).isfinite().all() and made(weight)[0] > 0 > made(weight)[1]


@pytest.mark.parametrize("kind", ["normal", "uniform", "laplace", "outlier"])
@pytest.mark.parametrize(
    ("bits", "grid"), [(b, g) for b in range(1, 9) for g in ("midrise", "integer") if b > 1 or g == "midrise"]
)
def test_bounds_are_near_the_best(bits, grid, kind):
    """Against 2000 candidates; real layers have heavy tails, and one weight of 12 standard deviations is no rarity."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, 1000, generator=generator)
    if kind == "uniform":
        rows = torch.rand(3, 1000, generator=generator) - 0.5
    elif kind == "laplace":
        rows = rows * torch.rand(3, 1000, generator=generator).log().neg().sqrt()
    elif kind == "outlier":
        rows[:, 0] = 12.0

    def error(upper):
        operand = quantize_weight(rows, -upper[:, None], upper[:, None], bits, grid, Rounding("ste"))
        return (operand * (upper[:, None] / levels(bits, grid)) - rows).square().sum(1)

    top = rows.abs().amax(1)
    best = torch.stack([error(top * part) for part in torch.linspace(0.01, 1.1, 2000)]).amin(0)
    found = error(minimum_error_bound(rows, bits, grid))
    assert (found <= best * 1.06).all(), (found / best).tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_bounds_of_depthwise_kernels_are_near_the_best(bits):
    """Nine weights: where the levels fall among them matters more than the range, which may be wider than they are."""
    rows = torch.randn(50, 9)

    def error(upper):
        operand = quantize_weight(rows, -upper[:, None], upper[:, None], bits, "integer", Rounding("ste"))
        return (operand * (upper[:, None] / levels(bits, "integer")) - rows).square().sum(1)

    best = torch.stack([error(rows.abs().amax(1) * part) for part in torch.linspace(0.05, 1.1, 500)]).amin(0)
    found = error(minimum_error_bound(rows, bits, "integer"))
    assert found.sum() <= best.sum() * 1.05 and found.sum() < error(rows.abs().amax(1)).sum()


def test_the_bound_of_zero_rows():
    assert minimum_error_bound(torch.zeros(2, 5), 4, "integer").tolist() == [0.0, 0.0]
    zero = quantizer(torch.zeros(3, 4), granularity="channel")
    assert (zero.upper > 0).all() and not zero(torch.zeros(3, 4)).any()  # so that it can be trained
    mixed = torch.tensor([[0.0, 0.0], [1.0, -0.5]])
    assert (quantizer(mixed, granularity="channel").upper > 0).all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((4, 4), float("nan")), "16 of 16 weights are NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "1 of 2 weights are NaN or infinite"),
        (torch.full((4, 4), 0.5), "its weight is constant"),
    ],
    ids=["nan", "inf", "constant"],
)
def test_weights_that_cannot_be_quantized(weight, message):
    layer = nn.Linear(weight.shape[1], max(weight.shape[0], 1))
    layer.weight = nn.Parameter(weight)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConversionError, match=f"2: .*{message}"):
        dq.quantize(model, last={"w_bits": 2, "normalize": True, "granularity": "tensor"})
    assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items())


def test_an_empty_weight_is_left_alone():
    layer = nn.Linear(4, 1)
    layer.weight, layer.bias = nn.Parameter(torch.empty(0, 4)), None
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), layer)
    assert dq.plan(model)["2"].reason == "its weight is empty" and dq.quantize(model)[2].weight.shape == (0, 4)
    made = WeightQuantizer(Settings(w_bits=4, grid="integer", normalize=False), ChannelLayout.forward((0, 4)), "2")
    with pytest.raises(ConversionError, match=r"2: its weight of shape \(0, 4\) is empty"):
        made.initialize(layer.weight)


def test_a_constant_weight_is_no_obstacle_where_it_is_not_normalized():
    layer = nn.Linear(4, 4)
    layer.weight.data.fill_(0.5)
    qlayer = dq.quantize(layer, first=(4, None), last=(4, None))
    torch.testing.assert_close(qlayer(torch.ones(1, 4)), layer(torch.ones(1, 4)))


def test_bounds_that_were_never_set_are_refused_by_name():
    settings = Settings(w_bits=4, grid="integer", normalize=False)
    made = WeightQuantizer(settings, ChannelLayout.forward((2, 3)), "layer1.conv")
    with pytest.raises(CalibrationError, match=r"layer1\.conv: .*weight quantizer were never set.*calibrate"):
        made(torch.ones(2, 3))


def test_learned_bounds_that_cross_zero_stay_finite():
    weight = torch.randn(2, 9)
    for settings in ({"grid": "integer"}, {"grid": "midrise"}, {"grid": "midrise", "normalize": True}):
        made = quantizer(weight, granularity="channel", **settings)
        made.upper.data.copy_(torch.tensor([-0.1, 0.0]))
        if made.normalize:
            made.lower.data.fill_(0.5)
        found = values(made, weight) if made.normalize else made(weight) * made.scale()[:, None]
        assert found.isfinite().all()
        assert made.codes(weight).max() < 16
