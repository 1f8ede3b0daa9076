"""What really ran is compared with the plan: a product with a weight that has no row is named by `calibrate`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import daqconvert as dq


class Multiply(torch.autograd.Function):
    """A product that torch.fx cannot see into."""

    @staticmethod
    def forward(ctx, x, w):
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Hidden(nn.Module):
    """A linear layer, and a product in a function that torch.fx cannot follow and no scan of the code finds."""

    def __init__(self, multiply=Multiply.apply):
        super().__init__()
        self.fc, self.proj, self.multiply = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), multiply

    def forward(self, x):
        return self.multiply(self.fc(x), self.proj)


def warned(qmodel, *batches):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dq.calibrate(qmodel, list(batches) or [torch.randn(2, 4)], progress=False)
    return [str(warning.message) for warning in caught]


def test_a_product_without_a_row_is_named_with_its_place():
    model = nn.Sequential(nn.Linear(4, 4), Hidden())
    assert "1.proj" not in [row.name for row in dq.plan(model)]
    (message,) = warned(dq.quantize(model))
    assert "1.proj (mm in 1, test_watch.py:" in message
    assert "F.linear(x, weight)" in message and "example_inputs" in message


def test_example_inputs_bring_the_product_into_the_plan():
    model, x = nn.Sequential(nn.Linear(4, 4), Hidden()), torch.randn(3, 4)
    plan = dq.plan(model, example_inputs=x)
    assert [row.name for row in plan] == ["0", "1.fc", "1.proj"]
    assert "mm in 1 multiplies by it (test_watch.py:" in plan["1.proj"].reason
    assert plan["1.proj"].site.macs == 16 and plan["1.proj"].site.params == 16
    assert warned(dq.quantize(model, example_inputs=x)) == []


def test_only_the_first_batch_is_watched_and_hooks_are_gone():
    qmodel = dq.quantize(Hidden())
    assert len(warned(qmodel, *torch.randn(3, 2, 4))) == 1
    assert not qmodel._forward_hooks and not qmodel._forward_pre_hooks


def test_what_the_plan_knows_is_no_surprise():
    assert warned(dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8)))) == []
    assert warned(dq.quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), exclude="1")) == []


def test_products_of_parameters_alone_are_no_surprise():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.down, self.up = (
                nn.Linear(4, 4),
                nn.Parameter(torch.randn(4, 2)),
                nn.Parameter(torch.randn(2, 4)),
            )

        def forward(self, x):
            return self.fc(x) @ (self.down @ self.up)

    assert warned(dq.quantize(LowRank())) == []


def test_a_vector_and_a_parameter_outside_the_model_are_named():
    outside = nn.Parameter(torch.randn(4, 4))
    (message,) = warned(dq.quantize(Hidden(lambda x, w: Multiply.apply(x, outside))))
    assert "a parameter that the model does not own" in message
    model = Hidden()
    model.proj = nn.Parameter(torch.randn(4))
    (message,) = warned(dq.quantize(model))
    assert "proj (mv" in message


def test_a_use_beside_the_site_of_a_converted_weight_is_named():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.proj, self.other = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), Hidden()
            self.other.proj = self.proj

        def forward(self, x):
            return self.fc(x) @ self.proj + self.other(x)

    (message,) = warned(dq.quantize(Both()))
    assert "proj (mm in other, test_watch.py:" in message and "beside its site" in message


@pytest.mark.parametrize("broken", [True, False])
def test_an_error_in_the_forward_leaves_nothing_behind(broken):
    class Fails(Hidden):
        def forward(self, x):
            if broken:
                raise RuntimeError("broken")
            return super().forward(x)

    qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 4), Fails()))
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            dq.calibrate(qmodel, [torch.randn(2, 4)], progress=False)
    else:
        assert warned(qmodel)
    assert not qmodel._forward_hooks and not qmodel._forward_pre_hooks
    assert not any(site.watchers for site in qmodel.modules() if hasattr(site, "watchers"))
    assert torch._C._len_torch_dispatch_stack() == 0
