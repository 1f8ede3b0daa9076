"""Multiply-accumulates of every operator against sums by hand, and where operands come from; on shapes alone too."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from daqconvert.errors import ConversionError
from daqconvert.macs import Places, count_macs, counting, observe
from daqconvert.macs.attribution import owner_of
from daqconvert.macs.provenance import Origin, Provenance
from helpers import awkward_models as awkward
from helpers.cases import CASES, NETWORKS, run


def events_of(model, *args):
    with torch.no_grad(), counting(model, args) as counter:
        model(*args)
    return counter.events


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


def test_the_fused_attention_block_counts_as_its_parts():
    x, block = torch.randn(2, 3, 8), nn.MultiheadAttention(8, 2, batch_first=True).eval()
    fused = events_of(block, x, x, x)
    with counting(block, (x,)) as counter:
        block(x, x, x)
    assert {e.op for e in fused} == {"_native_multi_head_attention"}
    assert "_native_multi_head_attention" not in {e.op for e in counter.events}
    for attention in (False, True):
        assert sum(e.macs for e in fused if e.attention is attention) == sum(
            e.macs for e in counter.events if e.attention is attention
        )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padded_batch_counts_its_tokens():
    """The encoder drops padded tokens by nested tensors, so they are not multiplied."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad(), counting(encoder, (x, padding)) as counter:
        encoder(x, src_key_padding_mask=padding)
    assert sum(e.macs for e in counter.events if not e.attention) == 6 * (4 * 64 + 2 * 128)
    assert sum(e.macs for e in counter.events if e.attention) == 2 * 8 * (4 * 4 + 2 * 2)


@pytest.mark.parametrize("name", ["resnet18", "vit", "mobilenet_v2"])
def test_totals_agree_with_torchs_own_flop_counter(name):
    make, size = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, 3, size, size)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x)
    events, shapes = events_of(model, x), observe(model, (x,), {})
    assert sum(e.macs for e in events if not e.attention) * 2 == flops.get_total_flops()
    assert shapes is not None
    assert [(e.macs, e.tensors, e.module, e.attention) for e in events] == [
        (e.macs, e.tensors, e.module, e.attention) for e in shapes
    ]


# where operands come from


class Derived(nn.Module):
    """Two layers on a parameter that stands in for an input, as DETR's queries: only the layers have weights."""

    def __init__(self):
        super().__init__()
        self.query, self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.query)) @ x.t()


def test_what_layers_make_of_a_parameter_is_an_activation():
    events = events_of(Derived(), torch.randn(5, 4))
    assert [(e.tensors[-1:], e.attention) for e in events] == [
        (("a.weight",), False),
        (("b.weight",), False),
        ((), True),
    ]


class Standardized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x):
        w = self.conv.weight
        return F.conv2d(x, (w - w.mean()) / w.std())


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        pytest.param(Standardized(), (1, 2, 4, 4), {"conv": 3 * 4 * 18}, id="computed"),
        pytest.param(awkward.parametrized(), (1, 4), None, id="parametrized"),
        pytest.param(awkward.old_weight_norm(), (1, 4), None, id="weight norm"),
        pytest.param(awkward.pruned(), (1, 4), None, id="pruned"),
        pytest.param(awkward.Projection(), (1, 4), None, id="used by another module"),
        pytest.param(awkward.Tied(), (1, 4), {"a": 16, "b": 16, "c": 8}, id="tied"),
        pytest.param(awkward.CalledTwice(), (1, 4), {"a": 16, "mid": 32, "b": 8}, id="called twice"),
        pytest.param(awkward.TwoNames(), (1, 4), {"a": 16, "b": 16}, id="two names"),
        pytest.param(awkward.BareParameters(), (1, 3, 9, 9), None, id="bare parameters"),
    ],
)
def test_each_product_finds_its_site(model, shape, expected):
    sites = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    sites |= {name for name, _ in model.named_parameters() if name in ("kernel", "raw")}
    macs = count_macs(model, Places(sites), (torch.randn(shape),), {}, required=True)
    assert macs is not None and all(macs.values())
    assert sum(macs.values()) == sum(e.macs for e in events_of(model.eval(), torch.randn(shape)))
    assert expected is None or macs == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_run_on_shapes_sees_what_a_run_on_values_sees(case):
    model, batch = case.make().eval(), case.batch()
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    before = torch.backends.mha.get_fastpath_enabled()
    shapes = observe(model, args, kwargs)
    assert torch.backends.mha.get_fastpath_enabled() is before
    with counting(model, (args, kwargs)) as counter:  # with gradients: nothing is fused
        run(model, batch)
    if case.id == "branch-on-data":
        assert shapes is None  # a value decides: no size, no guess
        shapes = observe(model, args, kwargs, required=True)
    assert shapes is not None
    assert not any(e.op.startswith(("_native", "_transformer")) for e in shapes)  # fake tensors run these for real
    assert [(e.macs, e.tensors) for e in shapes] == [(e.macs, e.tensors) for e in counter.events]


def test_weights_that_depend_on_the_data_count_for_the_module_that_convolves():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 3 * 2 * 9))

        def forward(self, x):
            routing = x.mean((2, 3)).softmax(-1)
            return F.conv2d(x, (routing @ self.experts)[0].view(3, 2, 3, 3))

    model, x = nn.Sequential(nn.ReLU(), Dynamic()), torch.randn(1, 2, 4, 4)
    events = events_of(model, x)
    assert [(e.op, e.tensors, e.module, e.macs) for e in events] == [
        ("mm", ("1.experts",), "1", 2 * 54),
        ("convolution", (), "1", 3 * 4 * 18),
    ]
    places = Places((), modules={"1": "kernel"}, tensors={"1.experts": "mix"})
    assert count_macs(model, places, (x,), {}) == {"kernel": 216, "mix": 108}


def test_products_of_activations_go_to_their_sites_in_turns():
    class Attention(nn.Module):
        def forward(self, q, v):
            return (q @ q.transpose(1, 2)).softmax(-1) @ v

    model = nn.ModuleDict({"inner": Attention()})
    model.forward = lambda q, v: model["inner"](q, model["inner"](q, v))
    args = (torch.randn(1, 3, 4), torch.randn(1, 3, 5))
    found = count_macs(model, Places((), products={"inner": ("scores", "sums")}), args, {}, required=True)
    assert found == {"scores": 2 * 36, "sums": 2 * 45}
    assert count_macs(model, Places((), products={"inner": ("all",)}), args, {}, required=True) == {"all": 162}
    assert count_macs(model, Places((), products={"inner": ("a", "b", "c")}), args, {}, required=True) == {}


def test_a_model_on_meta_counts_without_memory():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU()), torch.empty(2, 10**6)
    assert count_macs(model, Places({"0"}), (x,), {}) == {"0": 10**12}


def test_a_failure_of_the_model_is_told_only_where_the_inputs_are_the_users():
    model, x = nn.Linear(4, 4), torch.randn(1, 5)
    assert count_macs(model, Places({""}), (x,), {}) is None
    with pytest.raises(ConversionError, match="example_inputs: Linear fails"):
        count_macs(model, Places({""}), (x,), {}, required=True)


def test_owner_of_a_parameter():
    names = ("weight", "a.b.weight", "parametrizations.weight.0.u", "a.parametrizations.w.x")
    assert [owner_of(name) for name in names] == ["", "a.b", "", "a"]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_memory_that_is_used_again_is_not_taken_for_what_was_there(fake):
    provenance, mode = Provenance(), FakeTensorMode()
    seen = set()
    for _ in range(200):
        with mode if fake else torch.no_grad():
            tensor = torch.ones(7)
        assert provenance.of(tensor) == Origin()
        provenance.set(tensor, Origin(quantized=True))
        assert provenance.of(tensor.view(7, 1)).quantized
        seen.add(tensor.untyped_storage()._cdata)
        del tensor
    assert len(seen) == 200  # held by weak references: no address comes twice
