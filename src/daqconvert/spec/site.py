"""What was found in a model before anything is decided: `Site`, and `Call` where it is no layer of its own."""

from __future__ import annotations

from dataclasses import dataclass


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

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention: quantized only where `attention` asks for it."""
        return self.call is not None and self.call.is_product

    @property
    def is_computed(self) -> bool:
        """Whether its second operand depends on the model's inputs, so that no codes of it can be stored."""
        return self.call is not None and (self.call.dynamic or self.call.is_product)
