"""What users of Brevitas and of torchao would write for the layers of `qat_step.py` at W4A4.

Brevitas: `QuantConv2d` and `QuantLinear`; weights 4 bits per channel, symmetric, the scale a parameter that starts
from `max|W|`; inputs 4 bits per tensor, unsigned or symmetric, the scale a parameter, collected by `calibration_mode`
first (without it the first 300 steps take percentiles as well, which is slower still).

torchao 0.18: its `qat.FakeQuantizedLinear` has no form for convolutions, none per tensor for inputs, and is not fused
(`_fake_quantize_affine` is a chain of plain operations). Its fused quantizer for any tensor is
`pt2e.FusedMovingAvgObsFakeQuantize`, one call of `torch.fused_moving_avg_obs_fake_quant`, which its own QAT flow puts
around convolutions and linear layers for CPU backends. It observes ranges and does not learn them. `torchao-learned`
uses `pt2e.LearnableFakeQuantize`, the fused form of LSQ, whose step sizes are parameters, as ours are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.qat.qat_layers import operation, replaced
from benchmarks.qat.qat_networks import BITS, Task

SIGNED = (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
UNSIGNED = (0, 2**BITS - 1)


def brevitas(model: nn.Module, task: Task) -> nn.Module:
    """Return the network with Brevitas' layers, calibrated on the batch."""
    from brevitas.core.scaling import ScalingImplType
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    layers = {}
    for name, signed in task.signed.items():
        layer: Any = model.get_submodule(name)
        options = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": BITS,
            "weight_scaling_impl_type": ScalingImplType.PARAMETER_FROM_STATS,
            "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            "input_bit_width": BITS,
            "return_quant_tensor": False,
        }
        if isinstance(layer, nn.Conv2d):
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
            made = QuantConv2d(*shape, dilation=layer.dilation, groups=layer.groups, **options)
        else:
            made = QuantLinear(layer.in_features, layer.out_features, **options)
        made.load_state_dict(layer.state_dict(), strict=False)
        layers[name] = made
    model = replaced(model, layers).train()
    with torch.no_grad(), calibration_mode(model):
        model(task.x)
    return model.train()


class TorchaoLayer(nn.Module):
    """A convolution or linear whose input and weight pass through torchao's fake quantizers.

    Args:
        layer: The float layer; its weight and bias are taken over.
        signed: Whether the input has negative values; only the learned form uses it, the other finds a zero point.
        learned: Step sizes as parameters, instead of moving averages of the extremes.
    """

    def __init__(self, layer: nn.Module, signed: bool, learned: bool) -> None:
        super().__init__()
        self.layer = [layer]
        self.weight, self.bias = layer.weight, layer.bias
        self.input_fake_quant, self.weight_fake_quant = learnable(signed) if learned else observing()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output from fake-quantized operands."""
        return operation(self.layer[0], self.input_fake_quant(x), self.weight_fake_quant(self.weight), self.bias)


def observing() -> tuple[nn.Module, nn.Module]:
    """Return torchao's fused fake quantizers of an input (per tensor) and of a weight (per channel)."""
    from torchao.quantization.pt2e import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )

    of_input = FusedMovingAvgObsFakeQuantize(
        MovingAverageMinMaxObserver, *UNSIGNED, dtype=torch.quint8, qscheme=torch.per_tensor_affine
    )
    of_weight = FusedMovingAvgObsFakeQuantize(
        MovingAveragePerChannelMinMaxObserver, *SIGNED, dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )  # fmt: skip
    return of_input, of_weight


def learnable(signed: bool) -> tuple[nn.Module, nn.Module]:
    """Return torchao's fused fake quantizers with learned step sizes, of an input and of a weight."""
    from torchao.quantization.pt2e import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torchao.quantization.pt2e.learnable_fake_quantize import LearnableFakeQuantize

    lowest, highest = SIGNED if signed else UNSIGNED
    of_input = LearnableFakeQuantize(
        MovingAverageMinMaxObserver, lowest, highest, use_grad_scaling=True,
        dtype=torch.qint8 if signed else torch.quint8,
        qscheme=torch.per_tensor_symmetric if signed else torch.per_tensor_affine,
    )  # fmt: skip
    of_weight = LearnableFakeQuantize(
        MovingAveragePerChannelMinMaxObserver, *SIGNED, use_grad_scaling=True, dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric, ch_axis=0,
    )  # fmt: skip
    return of_input, of_weight


def torchao(model: nn.Module, task: Task, learned: bool = False) -> nn.Module:
    """Return the network with torchao's fake quantizers, their ranges set from the batch."""
    layers = {name: TorchaoLayer(model.get_submodule(name), s, learned) for name, s in task.signed.items()}
    model = replaced(model, layers).train()
    with torch.no_grad():
        model(task.x)
    if learned:
        from torchao.quantization.pt2e.learnable_fake_quantize import enable_range_learning

        model.apply(enable_range_learning)
    return model


def quantized_by_brevitas(model: nn.Module) -> set[str]:
    """Return the layers whose weight and input Brevitas quantizes."""
    from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer as Layer

    found = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    return {n for n, m in found.items() if m.weight_quant.is_quant_enabled and m.input_quant.is_quant_enabled}
