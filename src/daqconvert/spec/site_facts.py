"""What was found in a model before anything is decided: `Site`, its `Call` where it is no layer, its `SiteOutput`."""

from __future__ import annotations

from dataclasses import dataclass

OUTPUT_KIND = "Output"
OUTPUT_QUANTIZER = "output_quantizer"
"""Name of the child that quantizes a module's output."""


@dataclass(frozen=True)
class Call:
    """Where a site computes, if that is not the forward of the layer it is named after.

    Attributes:
        function: Name of what is called: `"linear"`, `"conv2d"`, `"matmul"`, `"scaled_dot_product_attention"`, ...
        modules: Dotted names of the modules whose forwards make the call, and are rewritten.
        holder: Dotted name of the module that keeps the quantizers.
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
    """What becomes of the output of a site, or of a sum, until somebody else computes with it.

    Attributes:
        place: Dotted name of a module whose output it is, where a quantizer can stand; None where there is none.
        batch_norm: Dotted name of the batch norm that it goes through first; None where it goes through none.
        lower: Lower bound of the activation behind (0 for a ReLU), or None.
        upper: Upper bound of the activation behind (6 for a ReLU6), or None.
        readers: Sites that read it.
        alone: Whether nothing else reads it.
        nonnegative: Whether it is proven non-negative.
        sources: Of a sum: the names of the sites and places whose outputs it adds.
        after: Of a sum: the site that stands before it.
        meets: Name of the site on whose input's grid it lies, which `deploy="integer"` decides; None: in float.
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
        params: Number of parameters of this module (weight and bias).
        reason: Why it cannot be converted; empty if it can.
        first: Whether it is a first site.
        last: Whether it is a last site.
        nonnegative: Whether the dataflow proves its input non-negative.
        macs: Multiply-accumulates of one forward at batch size 1, or None where no input size is known.
        notes: Remarks for the plan's row.
        call: Where it computes, if not in its own layer's forward.
        one_scale: Why its bounds and scale cannot be per channel; empty if they can.
        reads: Name of the first site that reads the same input tensor; its own where it is the first or the only one.
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
        """Whether it computes nothing: a quantizer on an output, which `deploy="integer"` adds."""
        return self.kind == OUTPUT_KIND

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed ones apart."""
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
