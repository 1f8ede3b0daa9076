"""Attention by its sites: torch's results for every argument of `nn.MultiheadAttention`; no fused path skips it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.layers.attention import PROJECTIONS
from daqconvert.layers.site import Watcher, watching
from daqconvert.models import in_mode, quantized_sites

BATCH, LENGTH, KEYS, WIDTH, HEADS = 2, 4, 3, 8, 2

BLOCKS = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "other-widths": {"kdim": 6, "vdim": 5, "batch_first": True},
    "no-bias": {"bias": False},
    "bias-kv": {"add_bias_kv": True, "batch_first": True},
    "zero": {"add_zero_attn": True},
    "bias-kv-and-zero": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 5},
}
MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.tensor([[False, True, False]]).expand(LENGTH, KEYS),
    "float": lambda: torch.randn(LENGTH, KEYS),
    "bool-3d": lambda: torch.rand(BATCH * HEADS, LENGTH, KEYS).argmax(-1, keepdim=True) == torch.arange(KEYS),
    "float-3d": lambda: torch.randn(BATCH * HEADS, LENGTH, KEYS),
}
PADDING = {
    "none": lambda: None,
    "bool": lambda: torch.tensor([[False, False, False], [False, False, True]]),
    "float": lambda: torch.randn(BATCH, KEYS),
}


def inputs(block, batched=True):
    """Return query, key and value in the layout that the block takes."""
    widths = (WIDTH, block.kdim, block.vdim)
    lengths = (LENGTH, KEYS, KEYS)
    found = [torch.randn(BATCH, n, width) for n, width in zip(lengths, widths, strict=True)]
    if not batched:
        return [x[0] for x in found]
    return found if block.batch_first else [x.transpose(0, 1) for x in found]


def made(name, **settings):
    block = nn.MultiheadAttention(WIDTH, HEADS, **BLOCKS[name]).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()  # torch starts the biases at zero
    both = {"first": settings, "last": settings} if settings else {}
    return block, dq.quantize(block, **both, **settings)


def watched(qblock, run):
    """Let the quantized class compute with its quantizers off: a watcher keeps it from torch's fused path."""
    sites = list(quantized_sites(qblock).values())
    seen = []
    watcher = Watcher()
    watcher.after = lambda site, y: seen.append(site.layer_name)
    with dq.disabled(qblock):
        stack = [watching(site, watcher) for site in sites]
        for context in stack:
            context.__enter__()
        found = run(qblock)
        for context in stack:
            context.__exit__(None, None, None)
    assert set(seen) == {*PROJECTIONS, "out_proj"}
    return found


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_its_own_path_computes_what_torch_computes(name, mask, padding):
    block, qblock = made(name)
    q, k, v = inputs(block)
    masks = {"attn_mask": MASKS[mask](), "key_padding_mask": PADDING[padding]()}
    for need, average in itertools.product((False, True), (False, True)):
        options = {**masks, "need_weights": need, "average_attn_weights": average}
        expected, weights = block(q, k, v, **options)
        found, others = watched(qblock, lambda m, options=options: m(q, k, v, **options))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (weights is None) == (others is None)
        if weights is not None:
            torch.testing.assert_close(others, weights, rtol=1e-5, atol=1e-5)
        with dq.disabled(qblock):
            exact = qblock(q, k, v, **options)
        assert torch.equal(exact[0], expected) and (weights is None or torch.equal(exact[1], weights))


@pytest.mark.parametrize("name", BLOCKS)
def test_unbatched_inputs(name):
    block, qblock = made(name)
    q, k, v = inputs(block, batched=False)
    for options in ({}, {"key_padding_mask": torch.tensor([False, False, True])}, {"attn_mask": MASKS["bool"]()}):
        expected, weights = block(q, k, v, **options)
        found, others = watched(qblock, lambda m, options=options: m(q, k, v, **options))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(others, weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_quantized_weights_are_what_torch_computes_with_their_values(name):
    block, qblock = made(name, w_bits=8, a_bits=None)
    q, k, v = inputs(block)
    other = nn.MultiheadAttention(WIDTH, HEADS, **BLOCKS[name]).eval()
    state = block.state_dict()
    values = {}
    for site in quantized_sites(qblock).values():
        quantizer = site.weight_quantizer
        view = quantizer.layout.bound_view
        operand = quantizer(site.float_weight()).reshape(quantizer.layout.view)
        scale = site.sum_scale()
        values[site.layer_name] = (operand * (scale.reshape(view) if scale.dim() else scale)).reshape(
            site.float_weight().shape
        )
    state["out_proj.weight"] = values["out_proj"]
    if "in_proj_weight" in state:
        state["in_proj_weight"] = torch.cat([values[p] for p in PROJECTIONS])
    else:
        state |= {f"{p}_weight": values[p] for p in PROJECTIONS}
    other.load_state_dict(state)
    for need in (False, True):
        expected, found = other(q, k, v, need_weights=need)[0], qblock(q, k, v, need_weights=need)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, block(q, k, v)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_is_the_same_and_holds_no_weight(name):
    block, qblock = made(name, w_bits=3, a_bits=4)
    q, k, v = inputs(block)
    dq.calibrate(qblock, [{"query": q, "key": k, "value": v}])
    frozen = dq.freeze(qblock)
    for options in ({}, {"need_weights": False}, {"attn_mask": MASKS["float"](), "average_attn_weights": False}):
        expected, found = qblock(q, k, v, **options), frozen(q, k, v, **options)
        assert torch.equal(found[0], expected[0])
        assert expected[1] is None or torch.equal(found[1], expected[1])
    assert not any(name.endswith("weight") for name in frozen.state_dict())


def test_a_causal_hint_without_a_mask_is_refused_as_torch_does():
    block, qblock = made("batch-first")
    x = torch.randn(BATCH, LENGTH, WIDTH)
    dq.calibrate(qblock, [{"query": x, "key": x, "value": x}])
    for module in (block, qblock):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(x, x, x, is_causal=True, need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_fused_paths_are_taken_by_the_original_alone(kind, monkeypatch):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    model = (layer if kind == "layer" else nn.TransformerEncoder(layer, 2)).eval()
    fused, nested = [], []
    original, pack = torch._transformer_encoder_layer_fwd, torch._nested_tensor_from_mask
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: fused.append(1) or original(*a))
    monkeypatch.setattr(torch, "_nested_tensor_from_mask", lambda *a, **k: nested.append(1) or pack(*a, **k))
    x, padding = torch.randn(BATCH, KEYS, WIDTH), PADDING["bool"]()
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [{"src": x, "src_key_padding_mask": padding}])
    fused.clear(), nested.clear()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        assert fused and bool(nested) == (kind == "encoder")
        with dq.disabled(qmodel):
            count = len(fused)
            assert torch.equal(qmodel(x, src_key_padding_mask=padding), expected)
            assert len(fused) == 2 * count
        fused.clear(), nested.clear()
        found = qmodel(x, src_key_padding_mask=padding)
        assert not fused and not nested
        frozen = dq.freeze(qmodel)
        assert torch.equal(frozen(x, src_key_padding_mask=padding), found) and not fused and not nested
    assert torch.equal(qmodel(x, src_key_padding_mask=padding), found)  # with gradients
    with in_mode(model, True), in_mode(qmodel, True):
        torch.manual_seed(0)
        trained = qmodel(x, src_key_padding_mask=padding)
    assert trained.isfinite().all()
