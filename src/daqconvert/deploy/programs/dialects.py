"""How each runtime wants to be told of integers: the dialects in which a program is written, as data.

Every dialect writes `convolution(dequantize(x), dequantize(weight), bias) -> clip -> quantize -> dequantize`. They
differ in the type of the codes, in how a clip, a weight and a bias are written, and in whether readers share a
`dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UINT8, INT8 = torch.uint8, torch.int8


@dataclass(frozen=True)
class Dialect:
    """What a runtime wants of a program.

    Attributes:
        codes: Type of the codes of activations. The frozen model has codes `0..255`; as `int8` they are 128 less.
        symmetric: Whether a zero point has to be 0: codes are written less their zero point. Only a model that was
            quantized for such a target has zero points for which this fits into int8.
        clip: How a range of less than 8 bits, or an activation that clips, is written. `"codes"`: a clip of the codes,
            behind `quantize`. `"float"`: a clip of the values, before it, which the runtime joins with the layer.
            `"apart"`: a clip with a `quantize` and `dequantize` on both sides.
        weight: `"codes"`: constants of int8 that are dequantized. `"values"`: float constants that are quantized and
            dequantized, and that the runtime folds.
        bias: `"codes"`: int32 in units of `input scale * weight scale`, dequantized. `"values"`: float.
        float_linear: Weight of a linear layer that returns float, as `weight`; `"float"` for a float weight.
        shared: Whether the readers of codes share one `dequantize`.
    """

    codes: torch.dtype = UINT8
    symmetric: bool = False
    clip: str = "codes"
    weight: str = "codes"
    bias: str = "codes"
    float_linear: str = "codes"
    shared: bool = True


DIALECTS: dict[str, Dialect] = {
    "onnxruntime": Dialect(),
    "openvino": Dialect(),
    "qnn": Dialect(clip="apart"),
    "tensorrt": Dialect(INT8, symmetric=True, clip="float", bias="values"),
    "executorch": Dialect(INT8, clip="float", bias="values", float_linear="float", shared=False),
    "litert": Dialect(INT8, clip="float", weight="values", bias="values"),
    "coreml": Dialect(INT8, clip="float", bias="values"),
    "inductor": Dialect(clip="float", bias="values"),
}
"""The dialect of each target. `packed` has none: it is no program but a form of ONNX of its own."""
