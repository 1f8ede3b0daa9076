"""Oscillating weights: what counts as one, the share that is logged, and freezing them at their level."""

import itertools

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.training.parts.oscillation import MOMENTUM, Oscillation, Tracker
from daqconvert.training.run import Step


def one_layer(weight):
    """A linear layer with a 4-bit weight of one row, levels at the integers -7 .. 7."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    model = dq.quantize(nn.Sequential(layer), bits={"0": (4, None)}, grid="integer", normalize=False)
    model[0].weight_quantizer.upper.data.fill_(7.0)
    return model


def followed(part):
    """Return name, site and state of every weight that a part follows."""
    return [(name, tracker.sites[name], tracker.state_of(name)) for name, tracker in part.trackers.items()]


def reference(codes, momentum=MOMENTUM):
    """The equations for one weight, in Python numbers."""
    frequency, direction, average = 0.0, 0, float(codes[0])
    for before, code in itertools.pairwise(codes):
        change = (code > before) - (code < before)
        turned = change != 0 and change == -direction
        frequency = momentum * turned + (1 - momentum) * frequency
        average = momentum * code + (1 - momentum) * average
        direction = change or direction
    return frequency, average


def test_frequency_and_average_are_the_equations():
    model = one_layer(torch.zeros(1, 4))
    site = model[0]
    tracker = Tracker({"0": site}, most=None)
    generator = torch.Generator().manual_seed(0)
    seen = [site.weight_quantizer.codes(site.weight).flatten().tolist()]
    for _ in range(60):
        site.weight.data.copy_(4 * torch.rand(1, 4, generator=generator) - 2)
        tracker.hold()
        tracker.update(threshold=1.0)
        seen.append(site.weight_quantizer.codes(site.weight).flatten().tolist())
    expected = [reference(codes) for codes in zip(*seen, strict=True)]
    assert max(f for f, _ in expected) > 0.2  # they do oscillate
    for i, (frequency, average) in enumerate(expected):
        assert tracker.state["frequency"][i].item() == pytest.approx(frequency, rel=1e-5)
        assert tracker.state["average"][i].item() == pytest.approx(average, rel=1e-5)


def test_a_walk_in_one_direction_is_no_oscillation():
    model = one_layer(torch.full((1, 2), -6.0))
    tracker = Tracker({"0": model[0]})
    for _ in range(12):
        model[0].weight.data.add_(1.0)
        tracker.update(threshold=0.02)
    assert tracker.state["frequency"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"w_bits": 1, "normalize": True}, id="1 bit normalized"),
        pytest.param({"w_bits": 2, "normalize": True}, id="2 bits normalized"),
        pytest.param({"w_bits": 2, "normalize": True, "granularity": "channel"}, id="normalized per channel"),
        pytest.param({"w_bits": 3, "grid": "midrise", "normalize": False}, id="midrise in real units"),
        pytest.param({"w_bits": 4}, id="integer per channel"),
        pytest.param({"w_bits": 3, "rounding": "lsq"}, id="lsq"),
        pytest.param({"w_bits": 4, "granularity": "tensor"}, id="integer per tensor"),
    ],
)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_the_codes_are_the_quantizers(settings, transposed):
    torch.manual_seed(0)
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2) if transposed else nn.Conv2d(4, 6, 3)
    model = dq.quantize(
        nn.Sequential(conv),
        a_bits=8,
        first=None,
        last=None,
        bits={"0": (settings["w_bits"], 8)},
        **{k: v for k, v in settings.items() if k != "w_bits"},
    )
    site = model[0]
    codes = site.weight_quantizer.codes(site.weight).reshape(-1)
    assert len(codes.unique()) > 1
    assert torch.equal(Tracker({"0": site}, most=None).state["code"], codes)
    assert torch.equal(Tracker({"0": site}, most=10).state["code"], codes[:: -(-len(codes) // 10)])


def shaken(part, model, steps, generator, size):
    """Take steps of noise on all weights and bounds, as a bad optimizer would."""
    for number in range(1, steps + 1):
        part.before_step(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.002 if "quantizer" in name else size
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        part.after_step(Step(number, steps, 1, 1.0))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_frozen_weights_keep_their_level(make, bits):
    model, generator = make(bits, first=(bits, 8), last=(bits, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.02)
    part.start()
    shaken(part, model, 40, generator, 0.05)
    row = {}
    part.after_epoch(row)
    assert 0.02 < row["frozen"] < 0.98
    before = {name: (state["frozen"].clone(), state["code"].clone()) for name, _, state in followed(part)}
    for _ in range(5):
        shaken(part, model, 4, generator, 0.05)
        for name, site, state in followed(part):
            frozen, level = before[name]
            codes = site.weight_quantizer.codes(site.weight).reshape(-1)
            assert torch.equal(codes[frozen], level[frozen])
            assert bool(state["frozen"][frozen].all())
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_a_step_does_to_frozen_weights_is_undone(make, bits):
    model, generator = make(bits, first=(bits, 8), last=(bits, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.02)
    part.start()
    shaken(part, model, 40, generator, 0.05)
    for number in range(10):  # until mean and std are at rest, too
        part.before_step(number)
        part.after_step(Step(42, 42, 1, 1.0))
    before = {name: site.weight.clone() for name, site, _ in followed(part)}
    part.before_step(42)
    with torch.no_grad():
        for _, site, state in followed(part):  # the others stay, so that mean and std do
            site.weight.add_(0.01 * state["frozen"].reshape(site.weight.shape))
    part.after_step(Step(42, 42, 1, 1.0))
    for name, site, _ in followed(part):
        torch.testing.assert_close(site.weight, before[name], rtol=0, atol=1e-4)  # undone, 0.01 was added


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_with_all_weights_frozen_nothing_grows(make, bits):
    model, generator = make(bits, first=(bits, 8), last=(bits, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.02)
    part.start()
    before = {name: float(site.weight.detach().std()) for name, site, _ in followed(part)}
    for _, _, state in followed(part):
        state["frozen"].fill_(True)
    for _ in range(20):
        shaken(part, model, 10, generator, 0.02)
    for name, site, _ in followed(part):
        assert 0.5 * before[name] < float(site.weight.detach().std()) < 2 * before[name]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_an_average_of_weights_is_evaluated_with_frozen_weights_at_their_level(make, bits):
    model, generator = make(bits, first=(bits, 8), last=(bits, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.02)
    part.start()
    shaken(part, model, 40, generator, 0.05)
    with torch.no_grad():  # stands for the averaged weights during an evaluation
        for _, site, _ in followed(part):
            site.weight.add_(0.05 * torch.randn(site.weight.shape, generator=generator))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with part.evaluating():
        for _, site, state in followed(part):
            codes = site.weight_quantizer.codes(site.weight).reshape(-1)
            assert torch.equal(codes[state["frozen"]], state["code"][state["frozen"]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_real_units_a_frozen_weight_is_the_middle_of_its_level(make):
    model, generator = make(4, first=(4, 8), last=(4, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.015)
    part.start()
    shaken(part, model, 30, generator, 0.05)
    for _, site, state in followed(part):
        frozen = state["frozen"].reshape(site.weight.shape)
        middle = site.weight_quantizer(site.weight) * site.weight_quantizer.scale().reshape(-1, 1)
        assert frozen.any()
        torch.testing.assert_close(site.weight[frozen], middle[frozen], rtol=1e-6, atol=0)


def test_logging_changes_nothing(make):
    model, generator = make(2), torch.Generator().manual_seed(0)
    part, other = Oscillation(model, freeze=False, threshold=0.02), make(2)
    part.start()
    shaken(part, model, 20, generator, 0.05)
    shaken(Oscillation(other, freeze=False, threshold=0.02), other, 20, torch.Generator().manual_seed(0), 0.05)
    row = {}
    part.after_epoch(row)
    assert 0 < row["oscillating"] < 1
    assert "frozen" not in row
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("freeze", [False, True])
def test_what_a_checkpoint_keeps_goes_on_as_if_nothing_had_been(make, freeze):
    def halves(interrupt):
        model, generator = make(2, first=(2, 8), last=(2, 8)), torch.Generator().manual_seed(0)
        part = Oscillation(model, freeze=freeze, threshold=0.015)
        part.start()
        shaken(part, model, 15, generator, 0.05)
        if interrupt:
            tensors, meta = {k: v.clone() for k, v in part.tensors().items()}, part.meta()
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            model = make(2, first=(2, 8), last=(2, 8))
            part = Oscillation(model, freeze=freeze, threshold=0.015)
            model.load_state_dict(weights)
            part.start()
            part.load(tensors, meta)
        shaken(part, model, 15, generator, 0.05)
        return model.state_dict(), part.tensors()

    for one, other in zip(halves(False), halves(True), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_other_bits_start_anew(make):
    model, generator = make(4, first=(4, 8), last=(4, 8)), torch.Generator().manual_seed(0)
    part = Oscillation(model, freeze=True, threshold=0.01)
    part.start()
    shaken(part, model, 30, generator, 0.05)
    assert any(state["frozen"].any() for _, _, state in followed(part))
    for _, site, _ in followed(part):
        site.weight_quantizer.bits = 3
    shaken(part, model, 1, generator, 0.05)
    for name, _, state in followed(part):
        assert part.trackers[name].bits[name] == 3
        assert not state["frozen"].any()
        assert int(state["code"].max()) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_sites_at_once_are_one_after_another(dtype, monkeypatch):
    """Sites of all kinds in one model, of which most have more weights than are followed."""
    monkeypatch.setattr("daqconvert.training.parts.oscillation.SAMPLE", 50)
    kinds = [
        {"w_bits": 1, "normalize": True},
        {"w_bits": 2, "normalize": True, "granularity": "channel"},
        {"w_bits": 3, "grid": "midrise", "normalize": False},
        {"w_bits": 4},
        {"w_bits": 3, "rounding": "lsq"},
        {"w_bits": 4, "granularity": "tensor"},
        {"w_bits": 8},
    ]
    torch.manual_seed(0)
    whole = nn.ModuleList()
    for kind in kinds:
        for layer in (nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(4, 3)):
            settings = {key: value for key, value in kind.items() if key != "w_bits"}
            whole.append(dq.quantize(nn.Sequential(layer), bits={"0": (kind["w_bits"], 8)}, **settings)[0].to(dtype))
    part = Oscillation(whole, freeze=False, threshold=0.02)
    part.start()
    sites = [site for _, site, _ in followed(part)]
    single = {name: Tracker({name: site}, 50) for name, site, _ in followed(part)}
    generator = torch.Generator().manual_seed(0)
    assert len(set(part.trackers.values())) == 2  # what is normalized, and what is not
    assert len(sites) == len(whole)
    for number in range(1, 21):
        if number == 10:
            for index in (0, 9):  # a midrise and an integer grid
                sites[index].weight_quantizer.set_bits(5)
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.002 if "quantizer" in name else 0.05) * noise)
        part.after_step(Step(number, 20, 1, 1.0))
        for tracker in single.values():
            tracker.update(0.02)
    assert sum(float(tracker.state["frequency"].sum()) for tracker in single.values()) > 0
    for name, _, state in followed(part):
        assert part.trackers[name].bits[name] == single[name].bits[name]
        for key, value in single[name].state.items():
            assert torch.equal(state[key], value), (name, key)
            assert state[key].dtype == value.dtype


def test_a_weight_of_two_layers_is_followed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    part = Oscillation(dq.quantize(model, w_bits=4, a_bits=4), freeze=True, threshold=0.02)
    part.start()
    assert list(part.trackers) == ["0"]
