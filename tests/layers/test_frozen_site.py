"""A frozen site computes each operand in one pass, equal to plain torch; kept operands never outlive their codes."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.errors import FrozenError
from daqconvert.functional import grid, native
from daqconvert.functional.input_operator import input_operand
from daqconvert.functional.native import only_values
from daqconvert.functional.weight_operator import weight_operand
from daqconvert.layers.frozen_site import FrozenSite
from helpers.converted_networks import NETWORKS, batch, quantized

KERNELS = pytest.mark.skipif(native.library() is None, reason="no compiled kernels here")
TRACING = pytest.mark.filterwarnings(
    "ignore:`torch.jit.trace:FutureWarning", "ignore:`torch.jit.trace:DeprecationWarning"
)
each_network = pytest.mark.parametrize("name", NETWORKS)
MIXED = ["beit", "bare", "conv"]


class Counting:
    """Stands for the compiled kernels and counts the calls of each."""

    def __init__(self):
        self.calls, self.kernels = Counter(), native.library()

    def __getattr__(self, name):
        self.calls[name] += 1
        return getattr(self.kernels, name)


@pytest.fixture
def calls(monkeypatch):
    counting = Counting()
    monkeypatch.setattr(native, "library", lambda: counting)
    return counting.calls


@pytest.fixture
def plain(monkeypatch):
    """Return a function that calls another with the compiled kernels switched off."""

    def without(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*args)

    return without


def sites(model):
    return [module for module in model.modules() if isinstance(module, FrozenSite)]


@torch.no_grad()
def shaken(name):
    """The same network with other weights and bounds."""
    qmodel = quantized(name)
    for parameter in qmodel.parameters():
        parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    return qmodel


def chain():
    """Two linears, one of them called twice."""
    qmodel = dq.quantize(
        nn.Sequential(nn.Linear(6, 6), shared := nn.Linear(6, 6), nn.ReLU(), shared), w_bits=3, a_bits=5
    )
    dq.calibrate(qmodel, [torch.randn(8, 6)])
    return dq.freeze(qmodel)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "flat", "empty", "one"])
@pytest.mark.parametrize("zero", [0, 5], ids=["unsigned", "signed"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_operand_of_an_input_is_the_same_without_kernels(bits, zero, layout, plain):
    zero = min(zero, 2**bits - 1)
    x = torch.randn(2, 3, 4, 6) * 3
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 0.25, 0.75, float("inf"), float("nan")])
    x = {
        "contiguous": x, "channels_last": x.to(memory_format=torch.channels_last), "strided": x[:, :, ::2, 1::2],
        "flat": x.flatten(), "empty": x[:0], "one": x[0, 0, 0, 2],
    }[layout]  # fmt: skip
    arguments = x, torch.tensor(0.5), torch.tensor(zero, dtype=torch.uint8), bits
    found, expected = input_operand(*arguments), plain(input_operand, *arguments)
    assert torch.equal(found.nan_to_num(99.0), expected.nan_to_num(99.0)) and found.stride() == expected.stride()


@pytest.mark.parametrize("kind", ["midrise", "integer"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_operand_of_a_weight_is_the_same_without_kernels(bits, kind):
    if (bits, kind) == (1, "integer"):
        pytest.skip("the integer grid starts at 2 bits")
    codes = torch.randint(0, 2**bits, (4, 3, 5, 5), dtype=torch.uint8)
    for given in (codes, codes.to(memory_format=torch.channels_last), codes[:, 1:]):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            found = weight_operand(given, bits, kind, dtype)
            assert found.dtype == dtype and torch.equal(found, grid.weight_operand(given, bits, kind, dtype))
    assert weight_operand(given, bits, kind, torch.float64).abs().max() <= 2**bits - 1


@each_network
def test_a_frozen_model_computes_the_same_without_kernels(name, plain):
    qmodel, x = quantized(name), batch(name)
    frozen = dq.freeze(qmodel)
    with torch.no_grad():
        expected = qmodel(x)
        assert torch.equal(frozen(x), expected)
        assert torch.equal(plain(frozen, x), plain(qmodel, x))


@KERNELS
def test_each_operand_and_each_output_takes_one_pass(calls):
    frozen, x = dq.freeze(quantized("conv")), batch("conv")
    calls.clear()
    frozen(x)
    each = len(sites(frozen))
    assert calls == {"daq_quantize_input": each, "daq_expand_weight": each, "daq_rescale": each}
    dq.cache_weights(frozen)
    calls.clear()
    frozen(x)
    assert calls == {"daq_quantize_input": each, "daq_rescale": each}


@TRACING
def test_who_wants_more_than_values_gets_plain_operations():
    x = torch.randn(3, 6)
    assert only_values(x, None) and not only_values(x.clone().requires_grad_())
    with torch.no_grad():
        assert only_values(x.clone().requires_grad_())
    asked = []
    torch.vmap(lambda row: asked.append(only_values(row)) or row)(x)
    torch.jit.trace(lambda row: asked.append(only_values(row)) or row, (x,), check_trace=False)
    assert asked == [False, False]


@TRACING
@pytest.mark.parametrize("cached", [False, True], ids=["decoded", "cached"])
def test_gradients_and_transforms_see_through_a_frozen_model(cached):
    frozen, x = chain(), torch.randn(4, 6)
    if cached:
        dq.cache_weights(frozen)
    expected = frozen(x)
    assert torch.equal(frozen(x.clone().requires_grad_()), expected)
    frozen[1].bias.requires_grad_()
    frozen(x).sum().backward()
    assert frozen[1].bias.grad is not None
    frozen.requires_grad_(False)
    assert torch.equal(torch.vmap(frozen)(x[:, None])[:, 0], expected)
    traced = torch.jit.trace(frozen, (x,))
    other = torch.randn(4, 6)
    assert torch.equal(traced(other), frozen(other))


@pytest.mark.parametrize("kind", ["forward", "cached"])
def test_an_input_is_never_written_to(kind):
    frozen, x = dq.freeze(quantized("conv")), batch("conv")
    before = x.clone()
    if kind == "cached":
        dq.cache_weights(frozen)
    first = frozen(x)
    assert torch.equal(frozen(x), first) and torch.equal(x, before)


@each_network
def test_cached_weights_change_no_value(name):
    frozen, x = dq.freeze(quantized(name)), batch(name)
    state, buffers = frozen.state_dict(), [key for key, _ in frozen.named_buffers()]
    with torch.no_grad():
        expected = frozen(x)
        kept = dq.cache_weights(frozen)
        stored = {id(site): site.weight_codes for site in sites(frozen) if "weight_codes" in site._buffers}
        assert kept == 4 * sum(codes.numel() for codes in stored.values()) > 0
        assert torch.equal(frozen(x), expected)
        assert list(frozen.state_dict()) == list(state) and [key for key, _ in frozen.named_buffers()] == buffers
        assert dq.cache_weights(frozen, enabled=False) == 0 and torch.equal(frozen(x), expected)
    assert all(site.cache is None for site in sites(frozen))


def test_cached_weights_are_for_frozen_models_alone():
    with pytest.raises(FrozenError, match=r"cache_weights: Linear has no frozen layer.*daqconvert\.freeze"):
        dq.cache_weights(nn.Linear(2, 2))


def load(model, other):
    model.load_state_dict(other.state_dict())


def assign(model, other):
    model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)


def write(model, other):
    for site, source in zip(sites(model), sites(other), strict=True):
        for key, buffer in source._buffers.items():
            site._buffers[key].copy_(buffer)
    for parameter, source in zip(model.parameters(), other.parameters(), strict=True):
        parameter.copy_(source)


@pytest.mark.parametrize("change", [load, assign, write])
@pytest.mark.parametrize("name", MIXED)
def test_cached_weights_follow_what_is_loaded(name, change):
    frozen, other, x = dq.freeze(quantized(name)), dq.freeze(shaken(name)), batch(name)
    dq.cache_weights(frozen)
    with torch.no_grad():
        assert not torch.equal(frozen(x), other(x))
        change(frozen, other)
        assert torch.equal(frozen(x), other(x))


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cached_weights_follow_the_dtype(name, dtype):
    frozen, x = dq.freeze(quantized(name)), batch(name).to(dtype)
    expected = copy.deepcopy(frozen).to(dtype)(x)
    before = dq.cache_weights(frozen)
    frozen.to(dtype)
    assert torch.equal(frozen(x), expected)
    assert sum(site.cache.nbytes for site in sites(frozen)) == before // 4 * dtype.itemsize


def test_cached_weights_follow_the_layout():
    frozen, x = dq.freeze(quantized("conv")), batch("conv").to(memory_format=torch.channels_last)
    expected = copy.deepcopy(frozen).to(memory_format=torch.channels_last)(x)
    dq.cache_weights(frozen)
    assert torch.equal(frozen.to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_keeps_operands_of_its_own(way):
    frozen, x = chain(), torch.randn(2, 6)
    dq.cache_weights(frozen)
    replica, expected = way(frozen), frozen(x)
    assert torch.equal(replica(x), expected)
    kept = [[site.cache.kept[2].data_ptr() for site in sites(model)] for model in (frozen, replica)]
    assert not set(kept[0]) & set(kept[1]) and len(kept[0]) == 2
    replica[0].weight_codes.fill_(0)
    assert torch.equal(frozen(x), expected) and not torch.equal(replica(x), expected)
    assert replica[1].cache.kept[0] is replica[1].weight_codes is not frozen[1].weight_codes


@pytest.mark.parametrize("name", ["bare", "conv"])
def test_cached_weights_under_the_compiler(name):
    torch._dynamo.reset()
    frozen, x = dq.freeze(quantized(name)), batch(name)
    dq.cache_weights(frozen)
    with torch.no_grad():
        expected = frozen(x)
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        other = dq.freeze(shaken(name))
        frozen.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x)) and not torch.equal(other(x), expected)


def test_exported_graphs_decode_whatever_is_cached():
    frozen, x = dq.freeze(quantized("conv")), batch("conv")
    dq.cache_weights(frozen)
    program = torch.export.export(frozen, (x,))
    assert not program.constants and torch.equal(program.module()(x), frozen(x))
    stored = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    assert stored <= sum(t.nbytes for t in frozen.state_dict().values())


def test_an_artifact_never_holds_operands(tmp_path):
    frozen = chain()
    before = dq.save(frozen, tmp_path / "before")
    dq.cache_weights(frozen)
    after = dq.save(frozen, tmp_path / "after")
    for file in before.iterdir():
        assert (after / file.name).read_bytes() == file.read_bytes()
