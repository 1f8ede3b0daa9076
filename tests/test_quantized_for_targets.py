"""What a target asks of a network, from the plan to the frozen model: zero points, outputs, sums, concatenations."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import daqconvert as dq
from daqconvert.functional.integer import CodeGrid, sums_agree
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.models import quantized_sites
from daqconvert.spec.targets import TARGETS
from helpers.integer_networks import NETWORKS, conv, trained


class Dense(nn.Module):
    """Features that are joined to all before them, as in DenseNet, and a head that reads them joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 4), conv(4, 4), nn.Conv2d(8, 4, 3, padding=1)
        self.head, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        joined = torch.cat([x, self.a(x)], 1)
        joined = torch.cat([joined, self.b(joined)], 1)
        return self.fc(F.relu(self.head(joined)).mean((2, 3)))


def made(name, target, w_bits=8, a_bits=8, **settings):
    """Return a network quantized for a target and calibrated, and its batch."""
    model, x = (Dense().eval(), torch.randn(6, 3, 8, 8)) if name == "dense" else trained(name)
    qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits, target=target, **settings)
    dq.calibrate(qmodel, [x])
    return qmodel.eval(), x


def train(qmodel, x, lr=0.05):
    """Take a few steps with a learning rate that moves every bound."""
    qmodel.train()
    optimizer = torch.optim.Adam(qmodel.parameters(), lr=lr)
    for _ in range(4):
        optimizer.zero_grad()
        qmodel(x).square().mean().backward()
        optimizer.step()
    return qmodel.eval()


def frozen_sites(frozen):
    return {m.layer_name: m for m in frozen.modules() if isinstance(m, FrozenSite)}


def check_zero_points(frozen, x):
    """Assert that each zero point is 0 in int8, and that no unsigned code passes 127."""
    for name, site in frozen_sites(frozen).items():
        bits = site.settings.a_bits
        assert int(site.input_zero_point) in (0, 2 ** (bits - 1)), name
        assert int(site.input_zero_point) > 0 or 2**bits - 1 <= 127, name
        if site.is_integer:
            low, high = site.y_range.tolist()
            assert (int(site.y_zero_point) == 0 and high <= 127) or int(site.y_zero_point) in (4, 8, 128), name
            assert high - int(site.y_zero_point) <= 127 and low - int(site.y_zero_point) >= -128, name


@pytest.mark.parametrize(
    ("name", "bits", "rounding"),
    [
        *((name, (8, 8), "daq") for name in (*NETWORKS, "dense")),
        *(("dense", bits, rounding) for bits in ((4, 4), (2, 3)) for rounding in ("daq", "ste", "lsq")),
        *(("residual", (4, 8), rounding) for rounding in ("ewgs", "dsq", "lsq")),
    ],
    ids=str,
)
def test_tensorrt_has_no_zero_points_after_training(name, bits, rounding):
    ends = {"first": (7, 8), "last": (7, 8)} if rounding == "lsq" else {}
    w_bits = min(bits[0], 7) if rounding == "lsq" else bits[0]
    qmodel, x = made(name, "tensorrt", w_bits, bits[1], rounding=rounding, **ends)
    check_zero_points(dq.freeze(qmodel), x)
    before = {key: value.clone() for key, value in qmodel.state_dict().items() if key.endswith((".upper", ".step"))}
    frozen = dq.freeze(train(qmodel, x))
    after = qmodel.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before if "input_quantizer" in key)
    check_zero_points(frozen, x)
    assert frozen(x).isfinite().all()


def test_tensorrt_rounds_the_shortcut_alone_and_the_sum():
    qmodel, _ = made("residual", "tensorrt")
    plan = dq.plan(qmodel)
    assert plan["block.conv2"].site.output.joins == "block" and plan["block.conv2"].site.output.meets is None
    assert plan["block.down.0"].site.output.meets == "block.down.1.output_quantizer"
    assert [row.name for row in plan if row.site.is_output] == [
        "pool.output_quantizer", "block.down.1.output_quantizer", "block.output_quantizer",
    ]  # fmt: skip
    assert "enters the sum at block in float" in str(plan)


class ReadTwice(nn.Module):
    """A sum of two terms of which none is read by the sum alone and unclipped."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x + F.relu(self.two(x))


def test_no_term_is_in_float_if_anything_else_reads_it_or_clips_it():
    plan = dq.plan(nn.Sequential(ReadTwice(), nn.Flatten(), nn.Linear(16, 2)), target="tensorrt")
    assert [row.site.output.joins for row in plan] == [None] * len(plan)
    assert plan["0.one"].site.output.meets and plan["0.two"].site.output.meets


@pytest.mark.parametrize("name", ["residual", "inverted"])
def test_a_term_in_float_has_its_batch_norm_in_its_scale(name):
    qmodel, x = made(name, "tensorrt")
    train(qmodel, x, 1e-3)
    frozen, joins = dq.freeze(qmodel), [row for row in dq.plan(qmodel) if row.site.output and row.site.output.joins]
    assert joins
    for row in joins:
        site, norm = frozen.get_submodule(row.name), frozen.get_submodule(row.site.output.batch_norm)
        own = qmodel.get_submodule(row.site.output.batch_norm)
        assert norm.running_var is None and not site.is_integer and site.bias is not None
        assert (site.scale[0] < 0) == (own.weight[0] < 0) and own.weight[0] < 0  # its gamma is negative
        read = {}
        for key, model in (("quantized", qmodel), ("frozen", frozen)):
            module = model.get_submodule(row.site.output.batch_norm)
            hook = module.register_forward_hook(lambda m, a, y, key=key, read=read: read.update({key: y.detach()}))
            inputs = model.get_submodule(row.name).register_forward_hook(
                lambda m, a, y, key=key, read=read: read.update({f"{key} input": a[0].detach()})
            )
            model(x)
            hook.remove(), inputs.remove()
        if torch.equal(read["quantized input"], read["frozen input"]):  # else codes before it differ
            torch.testing.assert_close(read["frozen"], read["quantized"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["litert", "executorch", "tensorrt"])
@pytest.mark.parametrize(("name", "expected"), [("dense", 3), ("joined", 3)])
def test_concatenated_values_share_a_scale_bit_for_bit_after_training(name, expected, target):
    qmodel, x = made(name, target)
    train(qmodel, x)
    groups = dq.plan(qmodel).input_groups()
    (leader,) = {groups[name] for name in groups if name.endswith("output_quantizer")}
    shared = [leader, *(name for name, first in groups.items() if first == leader)]
    outputs = [name for name in shared if name.endswith("output_quantizer")]
    assert len(outputs) == expected
    sites = frozen_sites(dq.freeze(qmodel))
    assert len({sites[name].input_scale.item() for name in shared}) == 1
    assert len({int(sites[name].input_zero_point) for name in shared}) == 1
    assert len({(dq.plan(qmodel)[name].settings.a_bits, dq.plan(qmodel)[name].signed) for name in shared}) == 1


class Transition(nn.Module):
    """What an average and an activation return is joined to the output of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool, self.act = conv(3, 4), nn.AvgPool2d(3, 1, 1), nn.SiLU()
        self.a, self.b, self.head = conv(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        return self.head(torch.cat([x, self.a(x), self.act(self.b(x))], 1))


def test_what_operators_return_is_on_the_grid_of_what_it_is_concatenated_with():
    qmodel, x = dq.quantize(Transition(), target="executorch"), torch.randn(4, 3, 8, 8)
    dq.calibrate(qmodel, [x])
    frozen, seen = dq.freeze(qmodel), []
    frozen.head.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    frozen(x)
    quantizer = frozen.a[2].output_quantizer
    assert dq.plan(qmodel).input_groups().keys() > {"a.2.output_quantizer", "act.output_quantizer"}
    codes = seen[0] / quantizer.input_scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert "act.output_quantizer" not in [row.name for row in dq.plan(Transition(), target="openvino")]


def test_a_reader_of_concatenated_values_at_the_same_bits_is_on_their_grid():
    groups = dq.plan(made("dense", "litert")[0]).input_groups()
    assert groups == dict.fromkeys(("a.2.output_quantizer", "b.output_quantizer", "head"), "stem.2.output_quantizer")
    assert "head" not in dq.plan(made("dense", "litert", 4, 4)[0]).input_groups()  # 4 bits are another grid
    assert not dq.plan(made("dense", "openvino")[0]).input_groups()


@pytest.mark.parametrize("name", [*NETWORKS, "dense"])
def test_every_convolution_and_linear_returns_codes(name):
    qmodel, _ = made(name, "litert", 4, 4)
    sites = frozen_sites(dq.freeze(qmodel))
    layers = [row.name for row in dq.plan(qmodel) if not row.site.is_output]
    assert layers and all(sites[layer].is_integer for layer in layers)


def test_without_such_a_target_the_last_linear_returns_float():
    qmodel, _ = made("residual", "openvino")
    assert not dq.freeze(qmodel).fc.is_integer
    assert [row.name for row in dq.plan(qmodel)] == [
        row.name for row in dq.plan(trained("residual")[0], deploy="integer")
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["residual", "dense"])
def test_state_dicts_and_artifacts_keep_it(name, target, tmp_path):
    qmodel, x = made(name, target, 4, 8)
    train(qmodel, x, 1e-3)
    again, _ = made(name, target, 4, 8)
    again.load_state_dict(qmodel.state_dict())
    assert torch.equal(again(x), qmodel(x))
    frozen = dq.freeze(qmodel)
    loaded = dq.load(
        dq.save(frozen, tmp_path / "it"), model=lambda: Dense() if name == "dense" else NETWORKS[name][0]()
    )
    assert torch.equal(loaded(x), frozen(x)) and dq.plan(loaded).target == target
    assert dq.plan(loaded) == dq.plan(frozen)
    assert {key: v.tolist() for key, v in loaded.named_buffers()} == {k: v.tolist() for k, v in frozen.named_buffers()}


@pytest.mark.parametrize("name", ["residual", "inverted", "joined", "dense"])
def test_calibrated_bounds_of_least_error_are_those_of_the_tied_grid(name):
    """No other symmetric bound has less squared error on what the input sees."""
    qmodel, x = made(name, "coreml", 8, 4, symmetric=True)  # where no two quantizers are one
    dq.calibrate(qmodel, [x], mode="eval")
    seen = {}
    with dq.disabled(qmodel):
        for key, site in quantized_sites(qmodel).items():
            site.register_forward_pre_hook(
                lambda m, args, key=key: seen.setdefault(key, []).append(args[0].detach().clone())
            )
        qmodel(x)
    checked = 0
    for key, site in quantized_sites(qmodel).items():
        quantizer = site.input_quantizer
        if quantizer.sign is not True or key not in seen:
            continue
        values, own = torch.cat([v.flatten() for v in seen[key]]), quantizer.upper.item()
        half = 2 ** (quantizer.bits - 1)

        def error(upper, values=values, half=half):
            scale = upper / (half - 1)
            return float(((values / scale).round().clamp(-half, half - 1) * scale - values).square().sum())

        checked += 1
        assert error(own) <= 1.15 * min(error(own * factor) for factor in (0.6, 0.75, 0.9, 1.1, 1.3, 1.6)), key
    assert checked


class SumsJoined(nn.Module):
    """Sums of convolutions that are concatenated, so that all are on one grid, with what was before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = conv(3, 4), nn.ModuleList([Added() for _ in range(4)])
        self.head = nn.Conv2d(20, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([x, *(block(x) for block in self.blocks)], 1))


class Added(nn.Module):
    """Two convolutions that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x) + self.two(x))


def test_sums_on_one_grid_are_settled_together():
    """A scale that is moved so that runtimes agree moves for all values on the grid; every sum agrees in the end."""
    moved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        x, qmodel = torch.randn(8, 3, 8, 8), dq.quantize(SumsJoined(), target="litert")
        dq.calibrate(qmodel, [x])
        plan, frozen = dq.plan(qmodel), dq.freeze(qmodel)
        sites, groups = frozen_sites(frozen), plan.input_groups()
        leader = "stem.2.output_quantizer"
        shared = [leader, *(name for name, first in groups.items() if first == leader)]
        assert len(shared) == 6  # stem, all sums and the head
        grids = {CodeGrid(sites[name].input_scale.item(), int(sites[name].input_zero_point)) for name in shared}
        assert len(grids) == 1
        (grid,) = grids
        own = quantized_sites(qmodel)[leader].input_quantizer.scale().item()
        moved += grid.scale != own
        for block in (f"blocks.{number}" for number in range(4)):
            terms = [sites[plan[f"{block}.{name}"].site.output.meets] for name in ("one", "two")]
            a, b = (CodeGrid(site.input_scale.item(), int(site.input_zero_point)) for site in terms)
            assert sums_agree(a, b, grid)
        assert sites["stem.0"].y_scale.item() == grid.scale
    assert moved  # else this test asserts nothing


@pytest.mark.parametrize("name", ["residual", "gated", "dense"])
def test_what_operators_return_is_on_the_grid_of_their_quantizer(name):
    qmodel, x = made(name, "qnn")
    frozen, seen = dq.freeze(qmodel), {}
    for key, module in frozen.named_modules():
        if hasattr(module, "output_quantizer"):
            module.register_forward_hook(lambda m, args, y, key=key: seen.update({key: y.detach().clone()}))
    frozen(x)
    assert seen.keys() == {row.site.output.place for row in dq.plan(qmodel) if row.site.is_output}
    for key, y in seen.items():
        quantizer = frozen.get_submodule(key).output_quantizer
        codes = y / quantizer.input_scale + quantizer.input_zero_point
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.min() > -0.5 and codes.max() < 255.5


@pytest.mark.parametrize("target", ["tensorrt", "litert", "qnn"])
@pytest.mark.parametrize("name", ["residual", "gated", "dense"])
def test_what_is_frozen_for_a_target_is_exported_with_the_same_codes(name, target, tmp_path):
    pytest.importorskip("onnxruntime")
    qmodel, x = made(name, target, 4, 8)
    report = dq.export(dq.freeze(qmodel), tmp_path / "it.onnx", x)
    assert report.agrees and sum(layer.differing or 0 for layer in report.layers) == 0


@pytest.mark.parametrize("name", ["dense", "residual"])
def test_a_finetuned_model_keeps_it_through_stages_of_bits_and_an_average_of_its_weights(name):
    qmodel, x = made(name, "tensorrt", 4, 8)
    loader = DataLoader(TensorDataset(x, torch.randint(0, 3, (6,))), batch_size=3)
    dq.finetune(qmodel, loader, loader, epochs=3, ema=0.5, progressive=((0.4, 8, 8), (0.7, 6, 8)), lr=0.01)
    before = dq.plan(made(name, "tensorrt", 4, 8)[0])
    assert [row.settings for row in dq.plan(qmodel)] == [row.settings for row in before]
    check_zero_points(dq.freeze(qmodel), x)
