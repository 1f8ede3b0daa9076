"""Every function of torch that sums products: converted with the right value, or listed in the plan with a reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: F401 # the sources below use it

import daqconvert as dq
from daqconvert.layers.functions import split_call, split_einsum
from daqconvert.models import quantized_sites

CONVERTED = {
    "matmul": "x @ self.w",
    "on the left": "self.w @ x",
    "operator.imatmul": "operator.imatmul(x, self.w)",
    "__matmul__": "x.__matmul__(self.w)",
    "__rmatmul__": "self.w.__rmatmul__(x)",
    "__rmatmul__ of data": "x.__rmatmul__(self.w)",
    "linalg.matmul": "torch.linalg.matmul(x, self.w)",
    "mm": "torch.mm(x, mat2=self.w)",
    "bmm": "x[None].bmm(self.w[None])",
    "mv": "torch.mv(self.w, x[0])",
    "inner": "torch.inner(x, self.w)",
    "inner on the left": "self.w.inner(x)",
    "tensordot": "torch.tensordot(x, self.w, dims=1)",
    "tensordot of axes": "torch.tensordot(self.w, x, ([1], [1]))",
    "addmm": "torch.addmm(self.b, x, self.w)",
    "addmm alpha beta": "torch.addmm(self.b, x, self.w, alpha=-0.5, beta=2)",
    "addmm method": "self.b.addmm(x, self.w, beta=0.25, alpha=3)",
    "addmm beta 0": "torch.addmm(self.b * float('nan'), x, self.w, beta=0)",
    "addmm weight on the left": "torch.addmm(self.b, self.w, x, alpha=0.5)",
    "addmm_": "torch.ones_like(x).addmm_(x, self.w, alpha=2, beta=0.5)",
    "baddbmm": "torch.baddbmm(input=self.b, batch1=x[None], batch2=self.w[None], beta=0.1, alpha=2)",
    "baddbmm_": "torch.ones_like(x)[None].baddbmm_(x[None], self.w[None])",
    "addbmm": "torch.addbmm(self.b, x[None], self.w[None], beta=0.5, alpha=2)",
    "addbmm_": "torch.ones_like(x).addbmm_(x[None], self.w[None], alpha=0.5)",
    "addmv": "torch.addmv(self.b, self.w, x[0], alpha=0.5, beta=3)",
    "addmv_": "torch.ones_like(x[0]).addmv_(self.w, x[0])",
    "einsum": "torch.einsum('ij,jk->ik', x, self.w)",
    "einsum of a list": "torch.einsum('ij,jk->ik', [self.w, x])",
    "einsum with an ellipsis": "torch.einsum('...j,jk->...k', x, self.w)",
    "einsum of axes": "torch.einsum(x, [0, 1], self.w, [2, 1], [0, 2])",
    "einsum of axes alone": "torch.einsum(x, [0, 1], self.w, [1, 2])",
    "linear": "F.linear(input=x, weight=self.w, bias=self.b)",
    "_C._nn.linear": "torch._C._nn.linear(x, self.w)",
    "conv1d": "torch.conv1d(x[None], self.w[..., None], padding='valid')",
    "aten.conv1d": "torch.ops.aten.conv1d(x[None], self.w[..., None])",
    "aten.mm": "torch.ops.aten.mm(x, self.w)",
    "aten.mm.default": "torch.ops.aten.mm.default(x, self.w)",
    "aten.addmm": "torch.ops.aten.addmm(self.b, x, self.w, beta=2)",
    "aten.linear": "torch.ops.aten.linear.default(x, self.w, self.b)",
    "aten.matmul": "torch.ops.aten.matmul(x, self.w)",
    "aten.einsum": "torch.ops.aten.einsum('ij,jk->ik', [x, self.w])",
    "aten.mv": "torch.ops.aten.mv.default(self.w, x[0])",
}
LISTED = {
    "einsum of three": ("torch.einsum('ij,jk,ik->ik', x, self.w, x)", "no quantized form of einsum of 3 operands"),
    "einsum of axes of three": (
        "torch.einsum(x, [0, 1], self.w, [1, 2], x, [0, 2], [0, 2])", "no quantized form of einsum of 3 operands",
    ),
    "multi_dot": ("torch.linalg.multi_dot([x, self.w, self.w])", "no quantized form of multi_dot"),
    "bilinear": ("F.bilinear(x, x, self.w[None])", "no quantized form of bilinear"),
    "aten.bilinear": ("torch.ops.aten.bilinear(x, x, self.w[None])", "no quantized form of bilinear"),
    "convolution": (
        "torch.convolution(x[None], self.w[..., None], None, [1], [0], [1], False, [0], 1)",
        "no quantized form of convolution",
    ),
    "aten.convolution": (
        "torch.ops.aten.convolution(x[None], self.w[..., None], None, [1], [0], [1], False, [0], 1)",
        "no quantized form of convolution",
    ),
    "conv_tbc": ("torch.conv_tbc(x[None], self.w[None], self.b)", "no quantized form of conv_tbc"),
    "aten.tensordot": ("torch.ops.aten.tensordot(x, self.w, [1], [0])", "no quantized form of aten.tensordot"),
    "sparse.mm": ("torch.sparse.mm(x.to_sparse(), self.w)", "no quantized form of _sparse_mm"),
    "vmap": ("torch.vmap(lambda row: row @ self.w)(x)", "torch.fx cannot follow"),
    "vmap of mv": ("torch.vmap(torch.mv, in_dims=(None, 0))(self.w, x)", "torch.fx cannot follow"),
    "Tensor.matmul": ("torch.Tensor.matmul(x, self.w)", "torch.fx cannot follow"),
    "attention": (
        "F.multi_head_attention_forward(x, x, x, 8, 2, self.packed, None, None, None, False, 0., self.w, None)[0]",
        "no quantized form of multi_head_attention_forward",
    ),
}  # fmt: skip
VECTORS = {
    "x @ vector": ("x @ self.b", "its weight is float32 of 1 dimensions"),
    "mv": ("x.mv(self.b)", "its weight is float32 of 1 dimensions"),
    "dot": ("x * torch.dot(x[0], self.b)", "no quantized form of dot"),
    "vdot": ("x * torch.vdot(self.b, x[0])", "no quantized form of vdot"),
    "linalg.vecdot": ("torch.linalg.vecdot(x, self.b)", "no quantized form of vecdot"),
}


def one_product(source: str) -> nn.Module:
    """Return a module whose forward is one expression of `x`, an 8x8 weight `w` and a bias `b`."""
    scope = dict(globals())
    exec(
        "import operator\n"
        "class One(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))\n"
        "        self.packed = nn.Parameter(torch.randn(24, 8))\n"
        f"    def forward(self, x):\n        return {source}\n",
        scope,
    )
    torch.manual_seed(0)
    return scope["One"]().eval()


@pytest.mark.parametrize("source", CONVERTED.values(), ids=CONVERTED.keys())
def test_a_converted_call_multiplies_the_rounded_operands(source):
    model, x = one_product(source), torch.randn(8, 8)
    qmodel = dq.quantize(model, w_bits=4, a_bits=4, first=(4, 4), last=(4, 4))
    assert [row.name for row in dq.plan(qmodel).converted] == ["w"] == [row.name for row in dq.plan(qmodel)]
    dq.calibrate(qmodel, [x], progress=False)
    with dq.disabled(qmodel):
        assert torch.equal(qmodel(x), model(x))
    (site,) = quantized_sites(qmodel).values()
    weight, operand = site.float_weight(), site.input_quantizer(x)
    reference = copy.deepcopy(model)
    rounded, scale = site.weight_quantizer(weight), site.weight_quantizer.scale()
    if scale.dim() and any(word in source for word in ("inner", "linear", "conv1d")):
        scale = scale.reshape(-1, *(1,) * (rounded.dim() - 1))  # a channel is a row here, and a column of `x @ w`
    with torch.no_grad():
        reference.w.copy_((rounded * scale).reshape(8, 8))
    expected = reference(operand * site.input_quantizer.scale())
    torch.testing.assert_close(qmodel(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, model(x), rtol=1e-3, atol=1e-3)
    assert torch.equal(dq.freeze(qmodel)(x), qmodel(x))
    assert dq.coverage(qmodel, x).share == 1.0


@pytest.mark.parametrize(("source", "reason"), LISTED.values(), ids=LISTED.keys())
def test_a_call_without_a_quantized_form_is_listed(source, reason):
    rows = {row.name: row.reason for row in dq.plan(one_product(source))}
    assert reason in rows["w"]
    assert rows.keys() == ({"w", "packed"} if "packed" in source else {"w"})
    _calibration_is_silent(source, 8)


@pytest.mark.parametrize(("source", "reason"), VECTORS.values(), ids=VECTORS.keys())
def test_a_product_with_a_vector_is_listed(source, reason):
    assert [(row.name, row.reason) for row in dq.plan(one_product(source))] == [("b", reason)]
    _calibration_is_silent(source, 8)


def _calibration_is_silent(source: str, width: int) -> None:
    """A listed product is no surprise: calibration warns of nothing."""
    model = nn.Sequential(nn.Linear(width, width), one_product(source))
    qmodel = dq.quantize(model, w_bits=8, a_bits=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dq.calibrate(qmodel, [torch.randn(width, width)], progress=False)


@pytest.mark.parametrize(
    "source", ["torch.outer(x[0], self.b)", "torch.kron(x, self.w)", "x * self.w", "torch.cdist(x, self.w)",
               "F.embedding_bag(torch.arange(8).reshape(2, 4), self.w) + x[:2]"],
)  # fmt: skip
def test_what_sums_no_products_has_no_row(source):
    assert list(dq.plan(one_product(source))) == []


def test_layers_that_multiply_in_kernels_of_their_own_are_listed():
    for layer, reason in (
        (nn.LSTM(4, 4), "recurrent"),
        (nn.GRUCell(4, 4), "recurrent"),
        (nn.Bilinear(4, 4, 4), "Bilinear"),
    ):
        (row,) = dq.plan(nn.Sequential(layer))
        assert row.name == "0" and reason in row.reason


def test_in_place_calls_write_into_their_argument():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            total = torch.ones_like(x)
            total.addmm_(x, self.w)
            return total

    model, x = InPlace(), torch.randn(4, 8)
    qmodel = dq.quantize(model)
    dq.calibrate(qmodel, [x], progress=False)
    assert 0 < (qmodel(x) - model(x)).norm() < 0.05 * model(x).norm()
    qmodel(x).square().sum().backward()
    assert qmodel.w.grad.any()


def test_the_operands_of_a_call():
    parts = split_call("addmm", 1, (torch.ones(2), torch.ones(1, 2), torch.ones(2, 2)), {"alpha": 3, "beta": 2})
    assert parts.bias.tolist() == [2.0, 2.0] and parts.operation(parts.x, parts.weight).tolist() == [[6.0, 6.0]]
    operands, product = split_einsum(("ij,jk->ik", [torch.ones(1, 2), torch.ones(2, 1)]))
    assert product(*operands).tolist() == [[2.0]]
