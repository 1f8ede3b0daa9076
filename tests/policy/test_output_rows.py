"""What a target makes of a policy: the rows of the plan, and policies that it cannot hold."""

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import PolicyError
from daqconvert.policy import from_dict, from_toml, to_dict, to_toml
from daqconvert.policy.plan_json import plan_from_dict, plan_to_dict
from daqconvert.spec import Policy, Rule, Settings
from daqconvert.spec.targets import TARGETS
from helpers.integer_networks import NETWORKS

MODEL = NETWORKS["residual"][0]


def planned(**arguments):
    return dq.plan(MODEL(), **{"w_bits": 4, "a_bits": 4, **arguments})


def rows(plan):
    return [(row.name, row.settings, row.signed, row.site.output, row.notes) for row in plan]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_stands_for_integers_everywhere_and_is_kept(target):
    plan = planned(target=target)
    assert plan.target == target and all(row.settings.deploy == "integer" for row in plan)
    assert f"Residual for {target}: " in str(plan)
    assert plan_from_dict(plan_to_dict(plan)) == plan
    again = dq.plan(MODEL(), policy=from_toml(plan.to_toml()))
    assert not plan.diff(again) and again.target == target
    assert f'target = "{target}"' in plan.to_toml() and "deploy" not in plan.to_toml()


def test_plans_for_two_targets_differ_if_only_in_that():
    change = planned(target="openvino").diff(planned(target="coreml"))
    assert change and str(change).endswith("target openvino -> coreml")
    assert not planned(target="openvino").diff(planned(target="openvino"))


def test_all_ways_to_name_a_target_give_the_same_plan(tmp_path):
    wanted = rows(planned(target="tensorrt"))
    (tmp_path / "it.toml").write_text('target = "tensorrt"\n[default]\nw_bits = 4\na_bits = 4\n')
    (tmp_path / "none.toml").write_text("[default]\nw_bits = 4\na_bits = 4\n")
    data = {"target": "tensorrt", "default": {"w_bits": 4, "a_bits": 4}}
    for policy in (tmp_path / "it.toml", data, Policy(Settings(4, 4), target="tensorrt")):
        assert rows(dq.plan(MODEL(), policy=policy)) == wanted
    assert rows(dq.plan(MODEL(), policy=tmp_path / "none.toml", target="tensorrt")) == wanted
    assert rows(dq.plan(MODEL(), policy=data | {"target": "litert"}, target="tensorrt")) == wanted
    assert rows(dq.plan(dq.quantize(MODEL(), w_bits=4, a_bits=4, target="tensorrt"))) == wanted


def test_policies_with_a_target_are_written_and_read_again():
    policy = Policy(Settings(4, 4), (Rule({"w_bits": 2}, match="fc"),), target="tensorrt", name="dict")
    assert from_dict(to_dict(policy)) == policy
    assert to_toml(policy).startswith('target = "tensorrt"\n')
    assert "target" not in to_dict(Policy())


def test_unsigned_inputs_of_tensorrt_have_seven_bits_and_all_others_keep_theirs():
    plan = planned(a_bits=8, target="tensorrt")
    found = {row.name: row.input_text for row in plan}
    assert found == {
        "stem.0": "8 signed", "pool.output_quantizer": "7 unsigned", "block.conv1": "7 unsigned",
        "block.conv2": "7 unsigned", "block.down.0": "7 unsigned", "block.down.1.output_quantizer": "8 signed",
        "block.output_quantizer": "7 unsigned", "fc": "7 unsigned",
    }  # fmt: skip
    assert "7 bits, for unsigned codes above 127 need a zero point in int8" in plan["fc"].notes
    four = planned(a_bits=4, first=(4, 4), target="tensorrt")
    assert (four["stem.0"].input_text, four["block.conv1"].input_text) == ("4 (calibrate decides)", "4 unsigned")


def test_layers_that_share_an_input_have_its_bits_and_sign_together():
    plan = planned(a_bits=8, share_inputs=True, target="tensorrt")
    assert plan.input_groups() == {"block.down.0": "block.conv1"}
    assert plan["block.down.0"].input_text == plan["block.conv1"].input_text == "7 unsigned"


CANNOT = {
    "deploy": ({"deploy": "float"}, r'^arguments: deploy = "float" contradicts target = "tensorrt"'),
    "deploy of a rule": (
        {"bits": {}, "rules": [{"match": "fc", "deploy": "float"}]},
        r'rule 1: "fc": deploy = "float" contradicts target = "tensorrt"',
    ),
    "deploy of the last": ({"last": {"deploy": "float"}}, r'\[last\]: deploy = "float" contradicts'),
    "zero points": ({"symmetric": False}, r"^arguments: symmetric = false contradicts"),
    "float input": (
        {"bits": {"block.conv1": (8, None)}},
        r'layer block.conv1 \(bits: "block.conv1"\): target = "tensorrt" cannot hold it: a_bits is float.*'
        r'exclude = \["block.conv1"\]',
    ),
    "float weight": ({"w_bits": None}, r"layer block.conv1 \(default\): .*cannot hold it: w_bits is float"),
    "mid-rise": (
        {"w_bits": 8, "grid": "midrise", "last": {"w_bits": 4}, "first": {"w_bits": 4}},
        r"layer block.conv1 \(default\): .*reach 255.*Set w_bits = 7, or grid = \"integer\"",
    ),
    "LSQ": ({"rounding": "lsq"}, r"layer stem.0 \(first\): .*codes of LSQ at 8 bits reach -128.*Set w_bits = 7\."),
    "an unknown target": ({"target": "tensort"}, r"^target: 'tensort' is no target. Nearest: tensorrt"),
}


@pytest.mark.parametrize(("arguments", "message"), CANNOT.values(), ids=list(CANNOT))
def test_what_a_target_cannot_hold_is_refused_with_the_layer_or_rule(arguments, message):
    for verb in (dq.plan, dq.quantize):
        with pytest.raises(PolicyError, match=message):
            verb(MODEL(), **{"w_bits": 4, "a_bits": 4, "target": "tensorrt", **arguments})


def test_presets_of_the_paper_and_files_that_contradict_are_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"^paper-w1a1 .*: a preset of the paper leaves everything .* in float"):
        dq.plan(MODEL(), preset="paper-w1a1", target="litert")
    (tmp_path / "it.toml").write_text('target = "qnn"\n[default]\ndeploy = "float"\n')
    with pytest.raises(PolicyError, match=r'it.toml \[default\]: deploy = "float" contradicts target = "qnn"'):
        dq.plan(MODEL(), policy=tmp_path / "it.toml")
    (tmp_path / "it.toml").write_text('target = "snpe"\n')
    with pytest.raises(PolicyError, match=r"it.toml target: 'snpe' is no target"):
        dq.plan(MODEL(), policy=tmp_path / "it.toml")


def test_layers_may_be_left_in_float_altogether():
    plan = planned(target="litert", exclude=["block.down.0"], last=None)
    assert [row.name for row in plan.skipped] == ["block.down.0", "fc"]
    assert planned(target="openvino", symmetric=True)["stem.0"].signed is True


def test_a_plan_for_a_quantized_model_takes_no_target():
    qmodel = dq.quantize(MODEL(), w_bits=4, a_bits=4)
    with pytest.raises(dq.ConversionError, match=r"its plan is fixed; found target"):
        dq.plan(qmodel, target="litert")
    assert dq.plan(qmodel).target is None


def test_operators_between_the_layers_return_codes_where_the_target_computes_integers_alone():
    outputs = {}
    for target in ("litert", "qnn"):
        plan = dq.plan(NETWORKS["gated"][0](), target=target)
        outputs[target] = {row.name: row.notes[0] for row in plan if row.site.is_output}
    assert outputs["litert"].items() <= outputs["qnn"].items()
    added = {name: outputs["qnn"][name] for name in outputs["qnn"].keys() - outputs["litert"].keys()}
    assert added == {"1.act.output_quantizer": "output of an operator"}  # the gate's product has one reader, 2
    rows = [row.name for row in dq.plan(NETWORKS["gated"][0](), target="qnn")]
    assert rows.index("1.conv") < rows.index("1.act.output_quantizer") < rows.index("1.reduce")


class Chain(nn.Module):
    """A linear whose output a GELU reads, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.act, self.two = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.act(self.one(x)))


@pytest.mark.parametrize("target", TARGETS)
def test_linears_get_output_quantizers_where_the_target_needs_them(target):
    found = [row.name for row in dq.plan(Chain(), target=target) if row.site.is_output]
    every = target in ("qnn", "executorch", "litert")
    assert found == (["one.output_quantizer", "two.output_quantizer"] if every else [])
