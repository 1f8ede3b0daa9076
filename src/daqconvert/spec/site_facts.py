"""What was found in a model before anything is decided: a `Site`, the `Call` of a call site, its `SiteOutput`."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT_KIND = "Output"
"""The `kind` of a site that is an output quantizer."""
OUTPUT_QUANTIZER = "output_quantizer"
"""Name of the child that quantizes a module's output."""


@dataclass(frozen=True)
class Call:
    """Where a site computes, if that is not the forward of the layer it is named after.

    Attributes:
        function: Name of what is called: `"linear"`, `"conv2d"`, `"matmul"`, `"scaled_dot_product_attention"`, ...
        modules: Dotted names of the modules whose forwards make the call, and are rewritten.
        holder: Dotted name of the module that holds the quantizers.
        tensors: Dotted names of the parameters and buffers that the weight is computed from; none for a product of
            activations.
        dynamic: Whether the second operand depends on the model's inputs: it has no codes to store.
    """

    function: str
    modules: tuple[str, ...]
    holder: str
    tensors: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention."""
        return not self.tensors


@dataclass(frozen=True)
class SiteOutput:
    """What becomes of the output of a site, or of a sum, until another operation computes with it.

    Attributes:
        place: Dotted name of a module that returns it and can have an output quantizer; None where there is none.
        batch_norm: Dotted name of the batch norm that it goes through first; None where it goes through none.
        lower: Lower bound of the activation that it goes through (0 for a ReLU); None where there is none.
        upper: Upper bound of the activation that it goes through (6 for a ReLU6); None where there is none.
        readers: Names of the sites that read it.
        alone: Whether nothing but these sites reads it.
        nonnegative: Whether it is proven non-negative.
        sources: Names of the sites and places whose outputs a sum adds; empty for the output of a site.
        after: Name of the site before a sum; empty for the output of a site.
        meets: Name of the site to whose input's grid it is rounded, which `deploy="integer"` decides; None for float.
    """

    place: str | None = None
    batch_norm: str | None = None
    lower: float | None = None
    upper: float | None = None
    readers: tuple[str, ...] = ()
    alone: bool = False
    nonnegative: bool = False
    sources: tuple[str, ...] = ()
    after: str = ""
    meets: str | None = None


@dataclass(frozen=True)
class Site:
    """One convolution, linear layer or product found in a model, before anything is decided about it.

    Attributes:
        name: Dotted path, the first of its aliases.
        kind: Class name, as `"Conv2d"`.
        weight_shape: Shape of the weight; empty where it has none.
        out_channels: Number of output channels.
        reduction: Number of products summed in one output element.
        params: Number of its parameters (weight and bias).
        reason: Why it cannot be converted; empty if it can.
        first: Whether it is a first site.
        last: Whether it is a last site.
        nonnegative: Whether the dataflow proves its input non-negative.
        macs: Multiply-accumulates of one forward at batch size 1, or None where no input size is known.
        notes: Remarks for the plan's row.
        call: The call, if it is a call site; None for a layer.
        one_scale: Why its bounds and scale cannot be per channel; empty if they can.
        reads: Name of the first site that reads the same input tensor, where several do (its own for the first);
            else empty.
        output: What becomes of its output; None where that cannot be told.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...] = ()
    out_channels: int = 0
    reduction: int = 0
    params: int = 0
    reason: str = ""
    first: bool = False
    last: bool = False
    nonnegative: bool = False
    macs: int | None = None
    notes: tuple[str, ...] = ()
    call: Call | None = None
    one_scale: str = ""
    reads: str = ""
    output: SiteOutput | None = None

    @property
    def is_output(self) -> bool:
        """Whether it is an output quantizer, which `deploy="integer"` adds, and multiplies nothing."""
        return self.kind == OUTPUT_KIND

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, but not a transposed one."""
        word = self.kind if self.call is None else self.call.function
        return "conv" in word.lower() and "transpose" not in word.lower() and len(self.weight_shape) > 2

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention: quantized only where `attention` asks for it."""
        return self.call is not None and self.call.is_product

    @property
    def is_computed(self) -> bool:
        """Whether its second operand depends on the model's inputs, so that no codes of it can be stored."""
        return self.call is not None and (self.call.dynamic or self.call.is_product)
