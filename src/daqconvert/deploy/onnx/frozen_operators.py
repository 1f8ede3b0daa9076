"""Custom operators for the steps of a frozen layer, which `torch.export` sees and `expansion` writes out later.

    operand = input_operand(x, scale, zero_point)     clip(round(x / scale), -zero_point, n - zero_point)
    weight  = weight_operand(codes)                   integer-valued, from uint8 codes
    y       = rescale(sum, scale, bias)               sum * scale + bias
    y       = requantize(sum, ...)                    integer deployment: codes of the output, on their grid
    y       = round_to_grid(x, scale, zero_point)     integer deployment: an output quantizer

Each computes exactly what the frozen layer computes without the operator. As custom operators they survive the
exporter's constant folding and merging of equal nodes. Their argument `layer` has no effect on values: it carries the
name of the layer into the graph. In ONNX they become the placeholders `daqconvert::InputOperand`, `WeightOperand`,
`Rescale`, `Requantize` and `RoundToGrid`, which never reach a file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from daqconvert.functional import grid as plain
from daqconvert.functional import input_operator, integer, products

DOMAIN = "daqconvert"


@torch.library.custom_op("daqconvert::input_operand", mutates_args=())
def input_operand(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, layer: str) -> Tensor:
    """Return `functional.input_operator.input_operand`; `layer` is a name and changes nothing."""
    return input_operator.input_operand(x, scale, zero_point, bits)


@torch.library.custom_op("daqconvert::weight_operand", mutates_args=())
def weight_operand(codes: Tensor, bits: int, grid: str, layer: str) -> Tensor:
    """Return `functional.grid.weight_operand` in float32; `layer` is a name and changes nothing."""
    return plain.weight_operand(codes, bits, grid, torch.float32)


@torch.library.custom_op("daqconvert::rescale", mutates_args=())
def rescale(acc: Tensor, scale: Tensor, bias: Optional[Tensor], output_dims: int, layer: str) -> Tensor:  # noqa: UP045
    """Return `functional.products.rescale`; `layer` is a name and changes nothing."""
    return products.rescale(acc, scale, bias, output_dims)


@torch.library.custom_op("daqconvert::requantize", mutates_args=())
def requantize(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, factor: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor,
    limits: Tensor, output_dims: int, layer: str,
) -> Tensor:  # fmt: skip
    """Return `functional.integer.requantize` times the output's scale; `layer` is a name and changes nothing."""
    numbers = integer.IntegerLayer(w_scale, factor, bias, scale, zero_point, limits)
    return integer.requantize(acc, numbers, x_scale, output_dims) * scale


@torch.library.custom_op("daqconvert::round_to_grid", mutates_args=())
def round_to_grid(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, layer: str) -> Tensor:
    """Return `functional.input_operator.input_operand` times the scale; `layer` is a name and changes nothing."""
    return input_operator.input_operand(x, scale, zero_point, bits) * scale


@input_operand.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, layer: str) -> Tensor:
    return torch.empty_like(x)


@weight_operand.register_fake
def _(codes: Tensor, bits: int, grid: str, layer: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@rescale.register_fake
def _(acc: Tensor, scale: Tensor, bias: Optional[Tensor], output_dims: int, layer: str) -> Tensor:  # noqa: UP045
    return torch.empty_like(acc)


@requantize.register_fake
def _(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, factor: Tensor, bias: Tensor, scale: Tensor, zero_point: Tensor,
    limits: Tensor, output_dims: int, layer: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(acc)


@round_to_grid.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, layer: str) -> Tensor:
    return torch.empty_like(x)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the functions by which `torch.onnx.export` writes each operator, as one placeholder node."""
    place_input = _placeholder("InputOperand", {"x": "float", "scale": "float", "zero_point": "uint8"}, bits="INT")
    place_weight = _placeholder("WeightOperand", {"codes": "uint8"}, bits="INT", grid="STRING")
    place_rescale = _placeholder("Rescale", {"acc": "float", "scale": "float", "bias": "float"}, output_dims="INT")
    place_grid = _placeholder("RoundToGrid", {"x": "float", "scale": "float", "zero_point": "uint8"}, bits="INT")
    numbers = {"w_scale": "float", "factor": "int8", "bias": "int32", "scale": "float", "zero_point": "uint8"}
    place_codes = _placeholder(
        "Requantize", {"acc": "float", "x_scale": "float", **numbers, "limits": "uint8"}, output_dims="INT"
    )

    # NOTE: the exporter reads these annotations: an annotated argument is an attribute, the others are tensors
    def onnx_input(x, scale, zero_point, bits: int, layer: str):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return place_input(x, scale, zero_point, bits=bits, layer=layer)

    def onnx_weight(codes, bits: int, grid: str, layer: str):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return place_weight(codes, bits=bits, grid=grid, layer=layer)

    def onnx_rescale(acc, scale, bias, output_dims: int, layer: str):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return place_rescale(acc, scale, bias, output_dims=output_dims, layer=layer)

    def onnx_grid(x, scale, zero_point, bits: int, layer: str):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        return place_grid(x, scale, zero_point, bits=bits, layer=layer)

    # fmt: off
    def onnx_codes(  # type: ignore[no-untyped-def] # noqa: ANN202
        acc, x_scale, w_scale, factor, bias, scale, zero_point, limits, output_dims: int, layer: str  # noqa: ANN001
    ):
        tensors = (acc, x_scale, w_scale, factor, bias, scale, zero_point, limits)
        return place_codes(*tensors, output_dims=output_dims, layer=layer)
    # fmt: on

    operators = torch.ops.daqconvert
    return {
        operators.round_to_grid.default: onnx_grid,
        operators.requantize.default: onnx_codes,
        operators.input_operand.default: onnx_input,
        operators.weight_operand.default: onnx_weight,
        operators.rescale.default: onnx_rescale,
        torch.ops.aten.group_norm.default: _group_norm,
    }


def _group_norm(x, num_groups: int, weight=None, bias=None, eps: float = 1e-5, cudnn_enabled: bool = True):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """Write a group norm as torch computes it: `x * scale + shift`, rounded to float32 where torch rounds.

    ONNX's own `GroupNormalization` is `E[x^2] - E[x]^2` in float32. Its error moves all elements of one value over the
    same boundary between two codes at once, and ONNX infers no shapes for it.
    """
    from onnxscript import opset21

    op: Any = opset21

    def rounded(value: Any) -> Any:
        return op.Cast(op.Cast(value, to=1), to=11)  # TensorProto.FLOAT, TensorProto.DOUBLE

    def placed(value: Any) -> Any:
        return op.Reshape(op.Cast(value, to=11), op.Constant(value_ints=[1, num_groups, x.shape[1] // num_groups, 1]))

    groups, axes = [0, num_groups, x.shape[1] // num_groups, -1], op.Constant(value_ints=[2, 3])
    wide = op.Cast(op.Reshape(x, op.Constant(value_ints=groups)), to=11)
    mean = op.ReduceMean(wide, axes, keepdims=1)
    centred = op.Sub(wide, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), axes, keepdims=1)
    scale = rounded(op.Reciprocal(op.Sqrt(op.Add(variance, op.Cast(op.Constant(value_float=eps), to=11)))))
    scale = scale if weight is None else rounded(op.Mul(scale, placed(weight)))
    shift = op.Neg(op.Mul(scale, rounded(mean)))
    shift = rounded(shift if bias is None else op.Add(shift, placed(bias)))
    return op.Reshape(op.Cast(op.Add(op.Mul(wide, scale), shift), to=1), op.Shape(x))


def _placeholder(name: str, inputs: dict[str, str], **attributes: str) -> Callable[..., Any]:
    """Return an onnxscript operator that has a schema without being registered anywhere."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def parameter(key: str, kind: str) -> Any:
        option = OpSchema.FormalParameterOption
        optional = option.Optional if name == "Rescale" and key == "bias" else option.Single
        return OpSchema.FormalParameter(key, f"tensor({kind})", param_option=optional)

    schema = OpSchema(
        name, DOMAIN, 1,
        inputs=[parameter(*item) for item in inputs.items()],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)")],
        attributes=[
            OpSchema.Attribute(key, getattr(OpSchema.AttrType, kind), required=True)
            for key, kind in (*attributes.items(), ("layer", "STRING"))
        ],
    )  # fmt: skip
    return Op(Opset(DOMAIN, 1), name, schema)
