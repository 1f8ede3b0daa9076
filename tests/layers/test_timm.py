"""timm's layers with a forward of their own."""

import torch

import daqconvert as dq


def test_timm_layers_keep_their_padding():
    from timm.layers import Conv2dSame

    layer, x = Conv2dSame(3, 4, 3, stride=2), torch.randn(2, 3, 7, 8)
    qlayer = dq.quantize(layer)
    dq.calibrate(qlayer, [x])
    assert qlayer(x).shape == layer(x).shape == (2, 4, 4, 4)
    assert (qlayer(x) - layer(x)).abs().max() < 0.05
    assert torch.equal(dq.freeze(qlayer)(x), qlayer(x))
