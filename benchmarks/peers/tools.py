"""What a user of Brevitas and of NNCF would write to quantize a trained network at W8A8, with their defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Quantized = tuple[nn.Module, str]


def brevitas_quantize(model: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], Any]) -> Quantized:
    """Quantize by Brevitas in its graph mode, or layer by layer where graph mode cannot trace or run the network.

    Args:
        model: The network in evaluation mode; it is changed.
        batches: Batches to calibrate on.
        run: Function that calls a network on a batch.

    Returns:
        The quantized network, and which of the two ways was used.
    """
    import copy

    from brevitas.graph.quantize import layerwise_quantize, preprocess_for_quantize, quantize

    try:
        quantized = quantize(preprocess_for_quantize(copy.deepcopy(model))).eval()
        brevitas_calibrate(quantized, batches, run)
        return quantized, "graph"
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    quantized = layerwise_quantize(model).eval()
    brevitas_calibrate(quantized, batches, run)
    return quantized, f"layerwise, as graph mode fails: {why}"


@torch.no_grad()
def brevitas_calibrate(model: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], Any]) -> None:
    """Collect the ranges of activations."""
    from brevitas.graph.calibrate import calibration_mode

    with calibration_mode(model):
        for batch in batches:
            run(model, batch)
    model.eval()
    run(model, batches[0])


def brevitas_quantizers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that quantize weights and activations, not those for biases, which are no operands."""
    from brevitas.proxy.parameter_quant import BiasQuantProxyFromInjectorBase
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    return [
        module
        for module in model.modules()
        if isinstance(module, QuantProxyFromInjector)
        and not isinstance(module, BiasQuantProxyFromInjectorBase)
        and module.is_quant_enabled
    ]


@contextmanager
def brevitas_disabled(model: nn.Module) -> Iterator[None]:
    """Switch every quantizer off."""
    from brevitas.graph.calibrate import quantization_status_manager

    with quantization_status_manager(
        model, disable_act_quant=True, disable_weight_quant=True, disable_bias_quant=True, is_training=False
    ):
        yield


def nncf_quantize(model: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], Any]) -> Quantized:
    """Quantize by NNCF's `quantize`, with its defaults; arguments and result as above."""
    import nncf

    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
    quantized.eval()
    with torch.no_grad():
        run(quantized, batches[0])
    return quantized, "nncf.quantize"


def nncf_quantizers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that quantize."""
    from nncf.torch.quantization.layers import BaseQuantizer

    return [module for module in model.modules() if isinstance(module, BaseQuantizer)]


@contextmanager
def nncf_disabled(model: nn.Module) -> Iterator[None]:
    """Switch every quantizer off."""
    quantizers: list[Any] = nncf_quantizers(model)
    for quantizer in quantizers:
        quantizer.disable_quantization()
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.enable_quantization()


TOOLS: dict[str, tuple[Callable[..., Quantized], Callable[..., list[nn.Module]], Callable[..., Any]]] = {
    "brevitas": (brevitas_quantize, brevitas_quantizers, brevitas_disabled),
    "nncf": (nncf_quantize, nncf_quantizers, nncf_disabled),
}
