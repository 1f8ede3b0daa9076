"""How often each operator multiplies, against sums by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from daqconvert.macs import counting, observe
from helpers.counted import events_of


def macs_of(model, *shapes):
    return sum(e.macs for e in events_of(model, *map(torch.randn, shapes)) if not e.attention)


class Apply(nn.Module):
    """Calls a function with one parameter."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(shape))

    def forward(self, *args):
        return self.function(self.w, *args)


HAND = {
    "linear": (nn.Linear(4, 6), [(2, 5, 4)], 2 * 5 * 4 * 6),
    "linear of one vector": (nn.Linear(4, 6, bias=False), [(4,)], 4 * 6),
    "conv1d": (nn.Conv1d(4, 6, 3, dilation=2), [(2, 4, 11)], 2 * 6 * 7 * 4 * 3),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2)), [(2, 4, 8, 9)], 2 * 6 * 6 * 4 * 4 * 6),
    "conv2d same": (nn.Conv2d(2, 3, 3, padding="same"), [(1, 2, 5, 5)], 3 * 25 * 2 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), [(1, 2, 4, 5, 4)], 3 * 3 * 4 * 3 * 2 * 8),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), [(1, 4, 6, 6)], 8 * 16 * 9),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 6, 6)], 2 * 6 * 16 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), [(2, 4, 5, 6)], 2 * 4 * 30 * 6 * 9),
    "transposed grouped": (nn.ConvTranspose1d(4, 6, 3, groups=2), [(1, 4, 7)], 4 * 7 * 3 * 3),
    "bilinear": (nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], 2 * 3 * 4 * 5),
    "einsum": (Apply(lambda w, x: torch.einsum("oi,bni->bno", w, x), 6, 4), [(2, 5, 4)], 2 * 5 * 4 * 6),
    "bmm": (Apply(lambda w, x: torch.bmm(x, w), 2, 4, 6), [(2, 5, 4)], 2 * 5 * 4 * 6),
    "baddbmm": (Apply(lambda w, x: torch.baddbmm(x[:, :, :1], x, w), 2, 4, 6), [(2, 5, 4)], 2 * 5 * 4 * 6),
    "addbmm": (Apply(lambda w, x: torch.addbmm(x[0, :, :1], x, w), 2, 4, 6), [(2, 5, 4)], 2 * 5 * 4 * 6),
    "weight first": (Apply(lambda w, x: w @ x, 6, 4), [(4, 5)], 6 * 4 * 5),
    "vector": (Apply(lambda w, x: w @ x, 6, 4), [(4,)], 6 * 4),
    "lstm": (nn.LSTM(8, 4, 2, bidirectional=True), [(3, 2, 8)], 6 * 2 * 16 * (8 + 4 + 8 + 4)),
    "gru": (nn.GRU(8, 4, batch_first=True), [(2, 3, 8)], 6 * 12 * (8 + 4)),
    "lstm cell": (nn.LSTMCell(8, 4), [(3, 8)], 3 * 16 * (8 + 4)),
    "attention block": (nn.MultiheadAttention(8, 2, batch_first=True), [(2, 3, 8)] * 3, 6 * 4 * 64),
    "encoder layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(),
        [(2, 3, 8)],
        6 * (4 * 64 + 2 * 128),
    ),
    "constant matrix": (Apply(lambda w, x: x @ torch.ones(4, 4) + w, 4), [(2, 4)], 0),
    "activations": (Apply(lambda w, x: x @ x.t() + w, 2, 2), [(2, 4)], 0),
}


with_hand = pytest.mark.parametrize(("model", "shapes", "expected"), HAND.values(), ids=HAND)


@with_hand
def test_macs_by_hand(model, shapes, expected):
    assert macs_of(model, *shapes) == expected


@with_hand
def test_macs_are_the_same_in_inference_mode(model, shapes, expected):
    """There composite operators (linear, lstm, conv2d with padding="same") come whole."""
    with torch.inference_mode():
        assert macs_of(model, *shapes) == expected


@with_hand
def test_macs_are_the_same_on_shapes_alone(model, shapes, expected):
    events = observe(model, tuple(map(torch.randn, shapes)), {}, required=False)
    assert events is not None
    assert sum(e.macs for e in events if not e.attention) == expected


class Attend(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_macs_of_attention(grad):
    q, k, v = torch.randn(2, 3, 5, 4, requires_grad=grad), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    with counting(Attend(), (q, k, v)) as counter:
        Attend()(q, k, v)
    assert [e.attention for e in counter.events] == [True, True]
    assert [e.macs for e in counter.events] == [2 * 3 * 5 * 7 * 4, 2 * 3 * 5 * 7 * 6]
