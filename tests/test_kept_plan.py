"""A model that was changed after `quantize`: what its plan says, and what is frozen, saved and loaded."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn

import daqconvert as dq
from daqconvert.errors import ConversionError


class Net(nn.Module):
    """Blocks in a list, a head, and a layer that is left in float."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.side = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return getattr(self, "head", getattr(self, "fc", None))(x + self.side(x))


X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def quantized(model=None, **settings):
    settings = {"w_bits": 4, "a_bits": 4, "exclude": "side", **settings}
    qmodel = dq.quantize(Net() if model is None else model, **settings)
    dq.calibrate(qmodel, [X])
    return qmodel.eval()


def replace_head(model):
    torch.manual_seed(2)
    model.fc = nn.Linear(8, 5)


def replace_block(model):
    torch.manual_seed(2)
    model.blocks[1] = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))


def delete_layer(model):
    model.blocks[2][0] = nn.Identity()


def delete_block(model):
    del model.blocks[0]


def prune_blocks(model):
    model.blocks = model.blocks[::2]


def rename(model):
    model.head = model.fc
    del model.fc


def put_in(model):
    torch.manual_seed(2)
    model.blocks.append(nn.Linear(8, 8))


def twice(model):
    model.blocks[3] = copy.deepcopy(model.blocks[0])


def share(model):
    model.blocks[3] = model.blocks[1]


CHANGES = {
    replace_head: ("fc is a float Linear now", {"fc"}, 4),
    replace_block: ("blocks.1.0 is a float Linear now", {"blocks.1.0", "blocks.1.2"}, 4),
    delete_layer: ("blocks.2.0 is gone", set(), 4),
    delete_block: ("blocks.1.0 is blocks.0.0 now", set(), 4),
    prune_blocks: ("blocks.2.0 is blocks.1.0 now", set(), 3),
    rename: ("fc is head now", set(), 5),
    put_in: ("blocks.4, a float Linear, was put in", {"blocks.4"}, 5),
    twice: ("blocks.0.0 is blocks.3.0 now", set(), 5),
    share: ("blocks.3.0 is gone", set(), 4),
}
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@each_change
def test_what_was_changed_is_told_and_what_is_there_is_frozen_saved_and_loaded(change, tmp_path):
    told, in_float, converted = CHANGES[change]
    qmodel = quantized()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that was not changed is not warned of
        assert len(dq.plan(qmodel).converted) == 5 and len(dq.plan(dq.freeze(qmodel)).converted) == 5
    change(qmodel)
    changed = rf": Net was changed after quantize: .*{re.escape(told)}.*call daqconvert\.quantize\.$"
    with pytest.warns(UserWarning, match=f"^plan{changed}"):
        plan = dq.plan(qmodel)
    assert {row.name for row in plan.skipped} == in_float | {"side"} and len(plan.converted) == converted
    for row in plan.skipped:
        assert row.reason == ("excluded" if row.name == "side" else "put in after quantize: it stays in float")
        assert type(qmodel.get_submodule(row.name)) is nn.Linear
        assert row.site.weight_shape == tuple(qmodel.get_submodule(row.name).weight.shape)
    for row in plan.converted:
        assert row.settings == qmodel.get_submodule(row.name).settings
    with pytest.warns(UserWarning, match=f"^calibrate{changed}"):
        dq.calibrate(qmodel, [X])
    with pytest.warns(UserWarning, match=f"^freeze{changed}"):
        frozen = dq.freeze(qmodel)
    expected = qmodel.eval()(X)
    assert torch.equal(frozen(X), expected)
    skeleton = Net()
    change(skeleton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the plan of the frozen model is true of it
        again = dq.load(dq.save(frozen, tmp_path / "artifact"), model=skeleton)
        assert torch.equal(again(X), expected)
        for model in (frozen, again):
            assert [(r.name, r.settings) for r in dq.plan(model)] == [(r.name, r.settings) for r in plan]


@each_change
def test_a_frozen_model_that_was_changed_is_saved_as_it_is(change, tmp_path):
    frozen = dq.freeze(quantized())
    change(frozen)
    frozen.requires_grad_(False)
    with pytest.warns(UserWarning, match="^save: Net was changed after quantize: "):
        path = dq.save(frozen, tmp_path / "artifact")
    skeleton = Net()
    change(skeleton)
    assert torch.equal(dq.load(path, model=skeleton)(X), frozen(X))


@each_change
def test_integer_deployment_of_a_changed_model_is_refused_before_anything_is_written(change, tmp_path):
    qmodel = quantized(w_bits=8, a_bits=8, deploy="integer")
    frozen = dq.freeze(qmodel)
    for model in (qmodel, frozen):
        change(model)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConversionError, match=r'^freeze: Net was changed.*deploy = "integer"'),
    ):
        dq.freeze(qmodel)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConversionError, match=r'^save: Net was changed.*deploy = "integer"'),
    ):
        dq.save(frozen, tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_a_model_inside_another_has_its_plan_there(tmp_path):
    qmodel = quantized()
    outer = nn.Sequential(qmodel, nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row.name for row in dq.plan(outer)] == [f"0.{row.name}" for row in dq.plan(qmodel)]
        assert [r.settings for r in dq.plan(outer)] == [r.settings for r in dq.plan(qmodel)]
        frozen = dq.freeze(outer)
        path = dq.save(frozen, tmp_path / "artifact")
    again = dq.load(path, model=nn.Sequential(Net(), nn.ReLU()))
    assert torch.equal(frozen(X), outer(X)) and torch.equal(again(X), frozen(X))
    assert [row.name for row in dq.plan(dq.freeze(qmodel))] == [row.name for row in dq.plan(qmodel)]
    with pytest.raises(ConversionError, match="quantized already"):
        dq.plan(outer, w_bits=4)
    mixed = nn.Sequential(qmodel, nn.Linear(4, 2))
    assert [row.name for row in dq.plan(mixed).skipped] == ["0.side", "1"]
    assert str(dq.plan(torch.compile(qmodel, backend="eager"))) == str(dq.plan(qmodel))


def test_two_models_inside_one_and_a_head_that_was_quantized_by_itself(tmp_path):
    qmodel, head = quantized(), dq.quantize(nn.Linear(8, 5), w_bits=3, a_bits=3, first=(3, 3), last=(3, 3))
    qmodel.fc = head
    plan = dq.plan(qmodel)
    assert plan["fc"].settings == head.settings and plan["fc"].bits == (3, 3) and len(plan.converted) == 5
    dq.calibrate(qmodel, [X])
    frozen = dq.freeze(qmodel)
    skeleton = Net()
    skeleton.fc = nn.Linear(8, 5)
    again = dq.load(dq.save(frozen, tmp_path / "artifact"), model=skeleton)
    assert torch.equal(again(X), qmodel.eval()(X))
    both = nn.ModuleList([quantized(), quantized(bits={"fc": 2})])
    assert dq.plan(both)["0.fc"].bits == (8, 8) and dq.plan(both)["1.fc"].bits == (2, 2)


def test_a_part_of_a_quantized_model_and_a_layer_of_another_are_refused():
    qmodel = quantized()
    with pytest.raises(ConversionError, match=r"^plan: Sequential: .*without a plan.*pass the whole model"):
        dq.plan(qmodel.blocks[0])
    qmodel.blocks[0][0] = quantized(nn.Sequential(nn.Linear(8, 8)), exclude=())[0]  # its name there was 0
    with (
        pytest.warns(UserWarning),
        pytest.raises(ConversionError, match=r"blocks\.0\.0 was quantized in another model"),
    ):
        dq.freeze(qmodel)


def test_reset_classifier_and_reparameterize_model_of_timm(tmp_path):
    model = timm.create_model("resnet10t", num_classes=4).eval()
    qmodel, x = dq.quantize(model, w_bits=8, a_bits=8), torch.randn(2, 3, 32, 32)
    dq.calibrate(qmodel, [x])
    qmodel.reset_classifier(3)
    with pytest.warns(UserWarning, match="fc is a float Linear now"):
        assert [row.name for row in dq.plan(qmodel).skipped] == ["fc"]
        frozen = dq.freeze(qmodel)
    skeleton = timm.create_model("resnet10t", num_classes=3)
    again = dq.load(dq.save(frozen, tmp_path / "artifact", source="timm:resnet10t", source_kwargs={"num_classes": 3}))
    assert torch.equal(again(x), qmodel.eval()(x)) and again.state_dict().keys() >= {"fc.weight"}
    assert torch.equal(dq.load(tmp_path / "artifact", model=skeleton)(x), qmodel(x))

    model = timm.create_model("repvgg_a0", num_classes=4).eval()
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    dq.calibrate(qmodel, [x])
    merged = reparameterize_model(qmodel)
    with pytest.warns(UserWarning, match="changed after quantize: .* is gone"):
        plan, counted = dq.plan(merged), dq.coverage(merged, x)
    assert [row.name for row in plan.converted] == ["head.fc"] and len(plan.skipped) == 22
    assert all(type(merged.get_submodule(row.name)) is nn.Conv2d for row in plan.skipped)
    assert counted.share < 0.05
