"""Parameters, MACs, BOPs and bytes of a plan: as they are stored, and unknown where nobody knows."""

import dataclasses

import pytest
import torch

import daqconvert as dq
from daqconvert.functional.packing import pack
from daqconvert.spec import Call, Plan, PlanRow, Settings, Site
from helpers.cases import BY_ID, SETTINGS

CHANNEL = Settings(4, 4, "channel", "integer", False)
LAYER = Site("a", "Conv2d", (5, 3, 3, 3), 5, 27, 140, macs=1000)
PRODUCT = Site("p", "matmul", call=Call("matmul", ("m",), "p"), macs=10)
COMPUTED = Site("c", "CondConv2d", (5, 3), 5, 27, 15, call=Call("conv2d", ("c",), "c", ("c.weight",), True))
LAZY = Site("z", "LazyLinear", reason="lazy")


@pytest.mark.parametrize(
    ("site", "settings", "sizes"),
    [
        # 135 weights are 17 bytes a bit plane; 5 biases 20 bytes; 5 scales, input scale and zero point 25 bytes
        pytest.param(LAYER, CHANNEL, (4 * 17 + 20, 560, 25, 1000 * 16), id="packed"),
        pytest.param(LAYER, CHANNEL.replace(w_bits=1, granularity="tensor"), (17 + 20, 560, 9, 1000 * 4), id="1 bit"),
        pytest.param(LAYER, CHANNEL.replace(a_bits=None), (88, 560, 20, 1000 * 4 * 32), id="float input"),
        pytest.param(LAYER, CHANNEL.replace(w_bits=None), (560, 560, 25, 1000 * 32 * 4), id="float weight"),
        pytest.param(LAYER, None, (560, 560, 0, 1000 * 1024), id="left alone"),
        pytest.param(PRODUCT, Settings(8, 8), (0, 0, 14, 640), id="product"),
        pytest.param(PRODUCT, None, (0, 0, 0, 10240), id="product, off"),
        pytest.param(COMPUTED, CHANNEL.replace(granularity="tensor"), (60, 60, 14, None), id="computed"),
        pytest.param(LAZY, None, (None, None, 0, None), id="lazy"),
        pytest.param(
            dataclasses.replace(LAYER, params=0, call=Call("linear", ("m",), "a", ("w",))),
            CHANNEL,
            (68, 0, 25, 16000),
            id="a parameter counted elsewhere",
        ),
    ],
)
def test_a_row(site, settings, sizes):
    row = PlanRow(site, settings, "default", reason="" if settings else "why not")
    assert (row.weight_bytes, row.float_bytes, row.scale_bytes, row.bops) == sizes


def test_totals_leave_out_what_is_unknown_and_say_so():
    rows = (
        PlanRow(LAYER, CHANNEL, "default"),
        PlanRow(LAZY, None, "-", reason="lazy"),
        PlanRow(PRODUCT, None, "-", reason="off"),
    )
    totals = Plan(rows, "Net", other_params=7).totals
    assert (totals.sites, totals.converted, totals.params) == (3, 1, 147)
    assert (totals.macs, totals.bops, totals.float_bops) == (1010, 16000 + 10240, 1010 * 1024)
    assert (totals.bytes, totals.float_bytes, totals.scale_bytes) == (88 + 28, 560 + 28, 25)
    assert (totals.unknown_macs, totals.unknown_bytes) == (1, 1)
    empty = Plan((), "Net").totals
    assert (empty.macs, empty.bops, empty.bytes, empty.scale_bytes) == (None, None, 0, 0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("case", [BY_ID[name] for name in ("chain", "upsampling", "root-linear")], ids=lambda c: c.id)
def test_bytes_are_those_of_the_frozen_model(case, settings):
    qmodel = dq.quantize(case.make(), **settings)
    dq.calibrate(qmodel, [case.batch()])
    frozen = dq.freeze(qmodel)
    for row in dq.plan(qmodel).converted:
        layer = frozen.get_submodule(row.name)
        stored = {key: value for key, value in layer.state_dict().items() if key != "weight_codes"}
        scales = sum(stored.pop(key).nbytes for key in ("scale", "input_scale", "input_zero_point") if key in stored)
        codes = layer.weight_codes if row.settings.w_bits is not None else torch.empty(0, dtype=torch.uint8)
        packed = pack(codes, row.settings.w_bits).nbytes if row.settings.w_bits is not None else 0
        assert row.scale_bytes == scales
        assert row.weight_bytes == packed + sum(value.nbytes for value in stored.values())


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.q(x) @ self.k(x).transpose(-2, -1)


def test_a_product_stores_scales_alone():
    qmodel = dq.quantize(Attention(), attention=6, share_inputs=True)
    dq.calibrate(qmodel, [torch.randn(2, 3, 8)])
    plan, frozen = dq.plan(qmodel), dq.freeze(qmodel)
    (row,) = (row for row in plan if row.site.is_product)
    stored = frozen.get_submodule(row.site.call.holder).state_dict()
    assert (row.weight_bytes, row.scale_bytes) == (0, sum(value.nbytes for value in stored.values()))
    assert (row.bits, plan.input_groups()) == ((6, 6), {"k": "q"})
