"""Output quantizers: their bounds are trained; they round tensors alone."""

import pytest

from daqconvert.errors import ConversionError
from helpers.integer_networks import quantized


def test_bounds_of_outputs_are_trained():
    qmodel, x = quantized("residual")
    qmodel.train()(x).square().mean().backward()
    for name in ("pool", "block", "block.bn2"):
        quantizer = qmodel.get_submodule(f"{name}.output_quantizer.input_quantizer")
        assert quantizer.upper.grad is not None and quantizer.upper.grad != 0


def test_a_module_that_returns_no_tensor_is_refused():
    qmodel, x = quantized("residual")
    qmodel.pool.forward = lambda x: (x, x)
    with pytest.raises(ConversionError, match=r"pool.output_quantizer: expected a tensor from MaxPool2d, found tuple"):
        qmodel(x)
