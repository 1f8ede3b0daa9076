"""Which operators multiply and add, and how often. One multiply-accumulate (MAC) is one product inside a sum.

    convolution              elements of the output * elements of one output channel's filter
    transposed convolution   elements of the input * elements of one input channel's filter
    matrix product           n * k * m, times the batch
    attention                queries * keys * head size, once for the scores and once for the values, masked or not

A fused kernel counts as the products that it computes. Biases, scales and softmax do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Shape = tuple[int, ...]


class Product(NamedTuple):
    """One product inside an operator.

    Attributes:
        macs: Multiply-accumulates.
        x: One operand; None if it is computed inside a fused kernel.
        w: The other operand (the weight if `role` is `"weight"`); None if it is computed inside a fused kernel.
        role: `"weight"` if the operator makes `w` a weight, whatever it is computed from (convolution, fused layer);
            `"attention"` if neither operand is a weight; `"matrix"` if this depends on what the operands are computed
            from.
    """

    macs: int
    x: Tensor | None
    w: Tensor | None
    role: str


def products_of(operator: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    """Return the products that one call of an operator, such as `"aten::mm"`, computes: none for most operators.

    Example:
        >>> import torch
        >>> products_of("aten::mm", (torch.ones(2, 3), torch.ones(3, 4)), {}, None)[0].macs
        24
    """
    count = _COUNTS.get(operator)
    return [] if count is None else [p for p in count(args, kwargs, out) if p.macs]


def _matrix(first: int) -> Callable[..., list[Product]]:
    """Return a counter of `a @ b`, arguments `first` and `first + 1`: `(..., n, k)` and `(..., k, m)` or `(k,)`."""

    def count(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
        named = [kwargs[key] for key in ("mat1", "mat2", "batch1", "batch2", "mat", "vec") if key in kwargs]
        a, b = [*args[first:], *named][:2]
        return [Product(a.numel() * (b.shape[-1] if b.dim() > 1 else 1), a, b, "matrix")]

    return count


def _linear(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    x, w = args[:2]
    return [Product(x.numel() * (w.shape[0] if w.dim() > 1 else 1), x, w, "matrix")]


def _convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    x, w, transposed = args[0], args[1], args[6]
    return [Product((x if transposed else out).numel() * math.prod(w.shape[1:]), x, w, "weight")]


def _deformable(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    return [Product(out.numel() * math.prod(args[1].shape[1:]), args[0], args[1], "weight")]


def _time_convolution(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    """Count `conv_tbc`, whose weight is `(kernel, C_in, C_out)`."""
    return [Product(out.numel() * math.prod(args[1].shape[:2]), args[0], args[1], "weight")]


def _trilinear(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    """Count `nn.Bilinear`, a sum of `x1 * W * x2` over both inputs; only the first product in each term is counted."""
    shapes = []
    for tensor, expanded in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for dim in sorted(expanded):
            shape.insert(dim, 1)
        shapes.append(shape)
    return [Product(math.prod(map(max, *shapes)), args[0], args[1], "weight")]


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    q, k, v = args[:3]  # (..., L, E), (..., S, E), (..., S, Ev)
    rows, keys = q.numel() // max(1, q.shape[-1]), k.shape[-2]
    return [
        Product(q.numel() * keys, q, k, "attention"),
        Product(rows * keys * v.shape[-1], None, v, "attention"),
    ]


def _lengths(x: Tensor) -> list[int]:
    """Return the number of tokens in every sequence of a batch `(N, L, E)`, nested or not."""
    if x.is_nested:
        return [int(row[0]) for row in x._nested_tensor_size()]
    return [int(x.shape[1])] * int(x.shape[0])


def _heads(q: Tensor, k: Tensor, size: int, x: Tensor | None, weights: tuple[Tensor, Tensor]) -> list[Product]:
    """Count an attention block; `weights` are the packed input projection `(3 E, E)` and the output projection."""
    queries, keys = _lengths(q), _lengths(k)
    pairs = sum(a * b for a, b in zip(queries, keys, strict=True))
    return [
        Product((sum(queries) + 2 * sum(keys)) * size * size, x, weights[0], "weight"),
        Product(pairs * size, None, None, "attention"),
        Product(pairs * size, None, None, "attention"),
        Product(sum(queries) * size * size, None, weights[1], "weight"),
    ]


def _attention_block(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    return _heads(args[0], args[1], args[3], args[0], (args[5], args[7]))


def _encoder_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    x, size, tokens = args[0], args[1], sum(_lengths(args[0]))
    feed_forward = [Product(tokens * w.numel(), None, w, "weight") for w in (args[14], args[16])]
    return _heads(x, x, size, None, (args[3], args[5])) + feed_forward


def _recurrent_layer(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    return _recurrent((args[0], args[1:3]), kwargs, out)


def _recurrent(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Product]:
    """Count a recurrent layer: every token is multiplied once by every matrix among the weights."""
    x, weights = args[0], [w for w in args[1] if w.dim() > 1]
    tokens = x.numel() // max(1, x.shape[-1])
    return [Product(tokens * w.numel(), None, w, "weight") for w in weights]


_COUNTS: dict[str, Callable[[tuple[Any, ...], dict[str, Any], Any], list[Product]]] = {
    **dict.fromkeys(["aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_int_mm"], _matrix(0)),
    **dict.fromkeys(["aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv"], _matrix(1)),
    **dict.fromkeys(["aten::addmm_", "aten::baddbmm_", "aten::addbmm_", "aten::addmv_"], _matrix(1)),
    **dict.fromkeys(["aten::_addmm_activation", "aten::_sparse_addmm", "aten::sspaddmm"], _matrix(1)),
    **dict.fromkeys(["aten::hspmm", "aten::_sparse_mm", "aten::_grouped_mm"], _matrix(0)),
    **dict.fromkeys(["aten::linear", "aten::mkldnn_linear"], _linear),
    **dict.fromkeys(["aten::convolution", "aten::_convolution"], _convolution),
    **dict.fromkeys(["aten::convolution_overrideable"], _convolution),
    "aten::conv_tbc": _time_convolution,
    "torchvision::deform_conv2d": _deformable,
    "aten::_trilinear": _trilinear,
    **dict.fromkeys(
        [
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_fused_attention_overrideable",
            "aten::_scaled_dot_product_attention_math_for_mps",
        ],
        _attention,
    ),
    "aten::_native_multi_head_attention": _attention_block,
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
    "aten::mkldnn_rnn_layer": _recurrent_layer,
    **dict.fromkeys(["aten::_cudnn_rnn", "aten::miopen_rnn"], _recurrent),
    "aten::_lstm_mps": lambda args, kwargs, out: _recurrent((args[0], args[2]), kwargs, out),
}
