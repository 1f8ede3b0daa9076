"""A frozen layer: a convolution or linear that holds integer codes and computes what its quantized form computed."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from daqconvert.functional.weight_operator import weight_operand
from daqconvert.layers.base import BareOperation, QuantizedLayer
from daqconvert.layers.computed import settle_weight
from daqconvert.layers.frozen_site import FrozenSite, drop_quantizers, empty_values, frozen_values
from daqconvert.layers.site import bits_text
from daqconvert.quantizers import ChannelLayout
from daqconvert.spec import Settings


class FrozenLayer(BareOperation, FrozenSite):
    """Mixin of the frozen layers: the state of a frozen site, and a forward that calls the bare operation.

    Attributes:
        weight: The weight in real units, decoded from the codes on every access. It exists for inspection, and for
            code that reads its dtype, device or shape; forward does not read it.
    """

    original: ClassVar[type[nn.Module]]
    output_dims: ClassVar[int]
    bias: Tensor | None

    @classmethod
    def freeze(cls, layer: QuantizedLayer) -> FrozenLayer:
        """Turn a quantized layer into its frozen form, in place."""
        settings, name, values = layer.settings, layer.layer_name, frozen_values(layer)
        drop_quantizers(layer)
        settle_weight(layer)
        return cls.adopt(layer, settings, name, values)

    @classmethod
    def skeleton(cls, layer: nn.Module, settings: Settings, name: str) -> FrozenLayer:
        """Turn a float layer into a frozen one whose values are to be loaded, in place."""
        settle_weight(layer)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        layout = cls.channel_layout(layer, tuple(weight.shape))  # type: ignore[arg-type] # reads `groups` alone
        return cls.adopt(layer, settings, name, empty_values(settings, weight, layout))

    @classmethod
    def adopt(cls, layer: nn.Module, settings: Settings, name: str, buffers: dict[str, Tensor]) -> FrozenLayer:
        """Make `layer` an instance of this class that holds `buffers`; if these include codes, delete the weight."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        dtype = weight.dtype
        if "weight_codes" in buffers:
            del layer.weight
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.hold(settings, name, dtype, buffers)
        return layer

    def real_weight(self) -> Tensor:
        """Return the weight in real units, computed from the codes if the layer has any."""
        stored = self._parameters.get("weight")
        if stored is not None:
            return stored
        if self.is_integer:  # the scale then includes a folded batch norm
            scale = self.integer_layer().weight_scale * self.integer_layer().factor
        else:
            scale = self.scale if self.settings.a_bits is None else self.scale / self.input_scale
        layout = self.channel_layout(tuple(self.weight_codes.shape))
        scale = scale.reshape(layout.bound_view) if scale.dim() else scale
        codes = self.weight_codes.reshape(layout.view)
        values = weight_operand(codes, self.settings.w_bits or 0, self.settings.grid, scale.dtype) * scale
        return values.reshape(self.weight_codes.shape).to(self.dtype)

    # NOTE: torch's classes declare `weight` as an attribute, so this property is annotated as one for mypy
    weight: Tensor = property(real_weight)  # type: ignore[assignment]

    def channel_layout(self, shape: tuple[int, ...]) -> ChannelLayout:
        """Return which dimension of a weight of this shape holds the output channels."""
        return ChannelLayout.forward(shape)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output from integer operands.

        Raises:
            FrozenError: In training mode.
        """
        weight = self._parameters.get("weight")
        return self.run(input, weight, self.bias, self.bare_operation(*args, **kwargs))

    def extra_repr(self) -> str:
        """Return the text of the original class and the bits."""
        return f"{super().extra_repr()}, {bits_text(self.settings)}, frozen"
