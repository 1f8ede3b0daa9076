"""What `deploy="integer"` decides: on whose grid every output lies, and where a quantizer is added."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.layers.output_quantizers import OutputQuantizer
from daqconvert.policy import from_toml
from helpers.cases import CASES, run
from helpers.integer_networks import NETWORKS, trained


def meets(model, **settings):
    plan = dq.plan(model, w_bits=4, a_bits=4, deploy="integer", **settings)
    return plan, {
        row.name: row.site.output.meets for row in plan if row.site.output is not None and not row.site.is_output
    }


def test_a_residual_block():
    plan, found = meets(trained("residual")[0])
    assert [row.name for row in plan if row.site.is_output] == [
        "pool.output_quantizer", "block.bn2.output_quantizer", "block.down.1.output_quantizer",
        "block.output_quantizer",
    ]  # fmt: skip
    assert found == {
        "stem.0": "pool.output_quantizer", "block.conv1": "block.conv2", "block.conv2": "block.bn2.output_quantizer",
        "block.down.0": "block.down.1.output_quantizer", "fc": None,
    }  # fmt: skip
    row = plan["pool.output_quantizer"]
    assert (row.settings.w_bits, row.settings.a_bits, row.signed, row.rule) == (None, 8, False, 'deploy = "integer"')
    assert plan["block.bn2.output_quantizer"].signed is None
    assert (plan["stem.0"].site.output.lower, plan["stem.0"].site.output.upper) == (0.0, 6.0)


def test_a_sum_that_a_module_returns():
    plan, found = meets(trained("inverted")[0])
    assert found["1.project"] == "1.bn.output_quantizer" and found["1.depth.0"] == "1.project"
    assert "1.output_quantizer" in [row.name for row in plan]  # read by a convolution and a sum
    assert "2.output_quantizer" not in [row.name for row in plan]  # read by a convolution alone
    assert found["3"] == "3.output_quantizer"  # the model's output


def test_an_activation_that_does_more_than_clip_ends_the_way():
    _, found = meets(trained("gated")[0])
    assert found["1.conv"] == "1.bn.output_quantizer"
    assert found["1.reduce"] == "1.expand"


def test_linears_round_to_each_other_or_stay_in_float():
    _, found = meets(trained("head")[0])
    assert found == {"conv": "one", "one": "two", "two": None}


def test_a_quantizer_before_a_relu_is_unsigned():
    class Stem(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.b(x), x

    plan, found = meets(Stem())
    assert found["a"] == "a.output_quantizer" and plan["a.output_quantizer"].signed is False


@pytest.mark.parametrize(
    ("settings", "name", "note"),
    [
        ({"exclude": ["stem.*"]}, "stem.0", None),
        ({"rules": [dq.Rule({"deploy": "float"}, match="stem.*")]}, "stem.0", None),
        ({"rules": [dq.Rule({"a_bits": None}, match="stem.*")], "first": {}}, "stem.0", "weight or input is in float"),
        ({"rules": [dq.Rule({"w_bits": 8, "grid": "midrise"}, match="stem.*")]}, "stem.0", "reach 255"),
    ],
    ids=["excluded", "float", "float operand", "too wide"],
)
def test_what_stays_in_float_says_why(settings, name, note):
    plan, found = meets(trained("residual")[0], **settings)
    assert found[name] is None
    assert note is None or any(note in text for text in plan[name].notes)


class Clipped(nn.Module):
    """Two convolutions with a clip between them."""

    def __init__(self, clip):
        super().__init__()
        self.a, self.b, self.clip = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3), clip
        self.register_buffer("low", torch.tensor(-0.1))
        self.register_buffer("high", torch.full((4, 1, 1), 0.2))

    def forward(self, x):
        return self.b(self.clip(self, self.a(x)))


KNOWN_CLIPS = {
    "position": (lambda m, x: torch.clamp(x, -0.1, 0.2), -0.1, 0.2),
    "keyword": (lambda m, x: x.clamp(max=0.2, min=-0.1), -0.1, 0.2),
    "above": (lambda m, x: torch.clip(x, max=0.2), None, 0.2),
    "clamp_min": (lambda m, x: torch.clamp_min(x, -0.1), -0.1, None),
    "clamp_max": (lambda m, x: x.clamp_max(max=0.2), None, 0.2),
    "in place": (lambda m, x: x.clamp_(-0.1, 0.2), -0.1, 0.2),
    "in place, result left": (lambda m, x: (x.clip_(max=0.2), x)[-1], None, 0.2),
    "crossing": (lambda m, x: torch.clamp(x, 0.3, 0.2), 0.2, 0.2),
    "one after another": (lambda m, x: F.hardtanh(x, 0.0, 6.0).clamp(-0.2, -0.1), -0.1, -0.1),
}
OTHER_CLIPS = {
    "position": lambda m, x: torch.clamp(x, m.low, m.high),
    "keyword": lambda m, x: torch.clamp(x, max=m.high),
    "method": lambda m, x: x.clamp(min=m.low),
    "one tensor": lambda m, x: x.clamp(min=m.low, max=m.high),
    "clip": lambda m, x: torch.clip(x, max=m.high),
    "clamp_min": lambda m, x: torch.clamp_min(x, m.low),
    "clamp_max": lambda m, x: x.clamp_max(m.high),
    "minimum": lambda m, x: torch.minimum(x, m.high),
    "maximum": lambda m, x: torch.maximum(x, m.low),
    "in place": lambda m, x: x.clamp_(max=m.high),
    "in place, result left": lambda m, x: (x.clamp_(max=m.high), x)[-1],
}


@pytest.mark.parametrize("name", KNOWN_CLIPS)
def test_every_way_to_write_a_clip_is_read(name):
    clip, lower, upper = KNOWN_CLIPS[name]
    output = dq.plan(Clipped(clip), deploy="integer")["a"].site.output
    assert (output.lower, output.upper) == (lower, upper)
    clipped_is_near(clip)


@pytest.mark.parametrize("name", OTHER_CLIPS)
def test_limits_that_are_tensors_end_what_is_known(name):
    output = dq.plan(Clipped(OTHER_CLIPS[name]), deploy="integer")["a"].site.output
    assert (output.lower, output.upper, output.nonnegative) == (None, None, False)
    clipped_is_near(OTHER_CLIPS[name])


def clipped_is_near(clip):
    torch.manual_seed(0)
    model, x = Clipped(clip).eval(), torch.randn(4, 3, 8, 8)
    qmodel = dq.quantize(model, deploy="integer")
    dq.calibrate(qmodel, [x])
    with torch.no_grad():
        expected, found = model(x), dq.freeze(qmodel)(x)
    assert (found - expected).norm() < 0.03 * expected.norm()  # 8 bits


def test_the_limits_of_a_relu6_are_those_that_it_has():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    model[1].max_val = 4.0
    assert dq.plan(model, deploy="integer")["0"].site.output.upper == 4.0


def test_a_transposed_convolution_says_so():
    plan = dq.plan(nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 2, 1)), deploy="integer")
    assert any("transposed" in note for note in plan["0"].notes)


def test_without_the_word_nothing_is_added():
    plan = dq.plan(trained("residual")[0], w_bits=4, a_bits=4)
    assert not any(row.site.is_output for row in plan)
    assert all(row.site.output is None or row.site.output.meets is None for row in plan)


@pytest.mark.parametrize("name", NETWORKS)
def test_its_policy_gives_the_plan_again(name):
    model = trained(name)[0]
    plan = dq.plan(model, w_bits=3, a_bits=5, deploy="integer")
    again = dq.plan(model, policy=from_toml(plan.to_toml()))
    assert not plan.diff(again) and [row.name for row in again] == [row.name for row in plan]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_awkward_model_converts(case):
    """Where fx cannot see, outputs stay in float; nothing else changes."""
    model, batch = case.make().eval(), case.batch()
    qmodel = dq.quantize(model, w_bits=4, a_bits=8, deploy="integer").eval()
    with dq.disabled(qmodel), torch.no_grad():
        for a, b in zip(leaves(run(qmodel, batch)), leaves(run(model, batch)), strict=True):
            assert torch.equal(a, b)
    quantizers = [m for m in qmodel.modules() if isinstance(m, OutputQuantizer)]
    assert all(m.layer_name in [row.name for row in dq.plan(qmodel)] for m in quantizers)


def leaves(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
