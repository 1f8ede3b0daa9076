"""The runtimes that a model can be deployed on, and what has to be known of each while the model is quantized.

A `Target` is data, a row of `TARGETS`. Its file can be written only if the model was quantized for it, where a runtime
asks for something that an export cannot repair: zero points, outputs that are codes, where a sum is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

from daqconvert.errors import DaqError, PolicyError, nearest


@dataclass(frozen=True)
class Target:
    """One runtime, or one form of a file for it.

    Attributes:
        name: What is typed: `target="tensorrt"`, `--target tensorrt`.
        suffix: Suffix of its file.
        extra: Name of the extra that installs what writes and runs the file, `pip install 'daqconvert[EXTRA]'`; empty
            if nothing here runs it.
        symmetric: Whether zero points have to be 0 in int8: signed inputs have the zero point `2**(bits - 1)`, and
            unsigned ones at most 7 bits.
        outputs: Which layers return codes. `"meeting"`: convolutions, and linear layers whose output one quantized
            input reads, because a linear may return float. `"all"`: each convolution and each linear layer.
        sums: Where a sum of two layers' outputs is rounded. `"both"`: both terms and the sum. `"shortcut"`: the sum
            and one term, the shortcut; the runtime adds within the kernel of the convolution that is the other.
        one_scale_concat: Whether all values that are concatenated have to be on one grid.
        operators: Whether what computes between the layers (activations, averages, products) has to return codes too.
    """

    name: str
    suffix: str
    extra: str
    symmetric: bool = False
    outputs: str = "meeting"
    sums: str = "both"
    one_scale_concat: bool = False
    operators: bool = False


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", ".onnx", "export"),
        Target("packed", ".onnx", "export"),
        Target("openvino", ".onnx", "openvino"),
        Target("tensorrt", ".onnx", "export", symmetric=True, sums="shortcut", one_scale_concat=True),
        Target("qnn", ".onnx", "qnn", outputs="all", operators=True),  # the HTP computes integers alone
        # XNNPACK and TFLite concatenate codes, and keep the weight of a linear layer in int8 only if it returns codes
        Target("executorch", ".pte", "executorch", outputs="all", one_scale_concat=True),
        Target("litert", ".tflite", "litert", outputs="all", one_scale_concat=True),
        Target("coreml", ".mlpackage", "coreml"),
        Target("inductor", ".pt2", ""),  # adds faster with "shortcut"; what was measured rounds both terms
    )
}
"""Every target by name, in the order in which messages and tables list them."""


def find_target(name: object, *, where: str = "target", error: type[DaqError] = PolicyError) -> Target:
    """Return the target of that name.

    Args:
        name: One of the keys of `TARGETS`.
        where: What the message of an error starts with.
        error: Class of the error.

    Raises:
        DaqError: Of the class `error`, if there is no such target; it names the nearest and all of them.

    Example:
        >>> find_target("tensorrt").symmetric
        True
        >>> find_target("tensort")
        Traceback (most recent call last):
        daqconvert.errors.PolicyError: target: 'tensort' is no target. Nearest: tensorrt, litert, openvino. Targets
        are: onnxruntime, packed, openvino, tensorrt, qnn, executorch, litert, coreml, inductor.
    """
    found = TARGETS.get(name) if isinstance(name, str) else None
    if found is None:
        close = nearest(name, TARGETS) if isinstance(name, str) else ""
        raise error(f"{where}: {name!r} is no target.{close} Targets are: {', '.join(TARGETS)}.")
    return found
