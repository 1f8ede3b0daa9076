"""Facts that are found in a model before anything is decided: `Site`, with `Call` and `SiteOutput`, and `Concat`."""

from __future__ import annotations

from dataclasses import dataclass

from daqconvert.spec.plain_values import added

OUTPUT_KIND = "Output"
"""The `kind` of a site that is an output quantizer."""
OUTPUT_QUANTIZER = "output_quantizer"
"""Name of the child that quantizes a module's output."""


@dataclass(frozen=True)
class Call:
    """The function call of a call site: what is called, by which modules, and who holds the quantizers.

    Attributes:
        function: Name of the function that is called: `"linear"`, `"conv2d"`, `"matmul"`, `"attention_scores"`, ...
        modules: Dotted names of the modules whose forwards make the call, and are rewritten.
        holder: Dotted name of the module that holds the quantizers.
        tensors: Dotted names of the parameters and buffers that the weight is computed from; none for a product of
            activations.
        dynamic: Whether the second operand depends on the model's inputs, so that it has no codes to store.
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
    """What happens to the output of a site, or to a sum of outputs, before another operation computes with it.

    Attributes:
        place: Dotted name of a module that returns the output and can have an output quantizer; None if there is none.
        batch_norm: Dotted name of the batch norm that the output goes through first; None if there is none.
        lower: Lower bound of the activation that the output goes through (0 for a ReLU); None if there is none.
        upper: Upper bound of the activation that the output goes through (6 for a ReLU6); None if there is none.
        readers: Names of the sites that read the output.
        alone: Whether only these sites read the output.
        nonnegative: Whether the output is proven non-negative.
        sources: Of a sum: names of the sites, and `place`s of the sums, that it adds; empty for the output of a site.
        after: Of a sum: name of the last site that runs before it; empty for the output of a site.
        meets: Name of the site whose input grid the output is rounded to, decided by `deploy="integer"`; None for
            float.
        entering: Of a sum: names of the sites whose output only the sum reads, with nothing but a batch norm between.
        joins: `place` of the sum that the output enters in float, which a target decides (`Target.sums`); None if the
            output is codes or enters no sum.
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
    entering: tuple[str, ...] = added(())
    joins: str | None = added(None)


@dataclass(frozen=True)
class Concat:
    """Values that are concatenated (`torch.cat`).

    Attributes:
        sources: Names of the sites, and `place`s of the sums, whose outputs are concatenated.
        readers: Names of the sites that read the result, its elements moved or not.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """One convolution, linear layer or product found in a model, before anything is decided about it.

    Attributes:
        name: Dotted path; the first, if a layer has several.
        kind: Class name of the layer, such as `"Conv2d"`; for a call site without a layer, name of the function.
        weight_shape: Shape of the weight; empty if there is none or it is not known.
        out_channels: Number of output channels.
        reduction: Number of products summed in one output element.
        params: Number of elements of the site's parameters (weight and bias).
        reason: Why the site cannot be converted; empty if it can.
        first: Whether a model input reaches the site without passing another site.
        last: Whether the site's output reaches a model output without passing another site.
        nonnegative: Whether the dataflow proves the site's input non-negative.
        macs: Multiply-accumulates of one forward at batch size 1, or None if no input size is known.
        notes: Remarks for the plan's row.
        call: The function call, if it is a call site; None for a layer.
        one_scale: Why bounds and scale cannot be per channel; empty if they can.
        reads: If several sites read the same input tensor, or values on one grid, name of the first of them (for the
            first itself, its own name); else empty.
        output: What happens to the site's output; None if it is not known.
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
        """Whether it is an output quantizer, which `deploy="integer"` adds and which multiplies nothing."""
        return self.kind == OUTPUT_KIND

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, but not a transposed one."""
        word = self.kind if self.call is None else self.call.function
        return "conv" in word.lower() and "transpose" not in word.lower() and len(self.weight_shape) > 2

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention; it is quantized only if `attention` has bits."""
        return self.call is not None and self.call.is_product

    @property
    def is_computed(self) -> bool:
        """Whether the second operand depends on the model's inputs, so that no codes of it can be stored."""
        return self.call is not None and (self.call.dynamic or self.call.is_product)
