"""`channels_last`: the same codes in every site, and the same sums for the same codes."""

from __future__ import annotations

import copy

import pytest
import torch

import daqconvert as dq
from daqconvert.deploy.comparing.probes import ModuleProbe
from helpers.converted_networks import CONVOLUTIONAL, NETWORKS, batch, quantized

IMAGES = [name for name in NETWORKS if len(NETWORKS[name][1]) == 3]
LAST = torch.channels_last


def record(model, x, forced=None):
    """Return the codes and outputs of every site."""
    probe = ModuleProbe(model)
    return probe.run((x,), {}, set(probe.layers()), forced)


@pytest.mark.parametrize("turned", ["model", "input", "both"])
@pytest.mark.parametrize("name", IMAGES)
def test_every_site_computes_the_same_from_the_same_codes(name, turned):
    frozen, x = dq.freeze(quantized(name)), batch(name)
    expected = record(frozen, x)
    other = copy.deepcopy(frozen).to(memory_format=LAST) if turned != "input" else frozen
    found = record(other, x if turned == "model" else x.to(memory_format=LAST), expected.codes)
    assert found.codes.keys() == expected.codes.keys() == expected.outputs.keys()
    for site, outputs in expected.outputs.items():
        assert all(torch.equal(a, b) for a, b in zip(found.outputs[site], outputs, strict=True)), site
        assert all(torch.equal(a, b) for a, b in zip(found.codes[site], expected.codes[site], strict=True)), site
    if name in CONVOLUTIONAL:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found.results, expected.results))  # noqa: B905


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_a_quantized_model_is_frozen_exactly_in_this_layout(name):
    qmodel, x = quantized(name).to(memory_format=LAST), batch(name).to(memory_format=LAST)
    with torch.no_grad():
        assert torch.equal(dq.freeze(qmodel)(x), qmodel(x))
