"""Weights that a layer computes from other parameters."""

from __future__ import annotations

import torch

import daqconvert as dq
from helpers.cases import BY_ID


def test_old_weight_norm_goes_on_computing_its_weight():
    model = BY_ID["old-weight-norm"].make()
    qmodel = dq.quantize(model)
    with torch.no_grad():
        qmodel[0].weight_g.mul_(2.0)
    x = torch.randn(3, 4)
    with dq.disabled(qmodel):
        bias = model[0].bias
        torch.testing.assert_close(qmodel[0](x) - bias, 2 * (model[0](x) - bias))
