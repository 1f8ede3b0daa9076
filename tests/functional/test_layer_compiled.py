"""`torch.compile` of a quantized layer: the codes, outputs and gradients of eager."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.layer_steps import SETTINGS, quantized, run, same


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", "default"), ("conv2d", "default"), ("transposed", "default"), ("reflect", "default"),
        ("linear", "lsq"), ("conv2d", "lsq per channel"), ("reflect", "lsq"), ("linear", "ewgs"), ("reflect", "ewgs"),
        ("linear", "dsq"), ("reflect", "dsq"),
    ],
)  # fmt: skip
def test_torch_compile_gives_the_same_codes_and_outputs(kind, settings, fresh_compiler):
    qmodel, x = quantized(kind, **SETTINGS[settings])
    found = run(qmodel, x)
    same(run(torch.compile(copy.deepcopy(qmodel), fullgraph=True), x), (found[0], _named_as_compiled(found[1])))


def _named_as_compiled(grads):
    return {key if key == "x" else f"_orig_mod.{key}": grad for key, grad in grads.items()}
