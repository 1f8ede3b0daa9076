"""Small frozen models, and an ONNX file's graph after ONNX Runtime's own optimization."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import daqconvert as dq


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread; on a busy machine, for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def frozen() -> Callable[..., nn.Module]:
    """Quantize (3/4 bits, first and last too), calibrate and freeze a model, once its batch norms have seen data."""

    def make(model: nn.Module, x: Any, **settings: Any) -> nn.Module:
        if any(hasattr(module, "running_mean") for module in model.modules()):
            model.train()
            with torch.no_grad():
                for _ in range(2):
                    model(x)
        chosen = {"w_bits": 3, "a_bits": 4, **settings}
        ends = {key: value for key, value in chosen.items() if key in ("w_bits", "a_bits")}
        qmodel = dq.quantize(model.eval(), **{"first": ends, "last": ends, **chosen})
        dq.calibrate(qmodel, [x])
        return dq.freeze(qmodel)

    return make


@pytest.fixture
def chain() -> nn.Module:
    """Convolution, batch norm, ReLU, convolution, pooling, linear."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.fixture
def images() -> Tensor:
    """Eight images for `chain`."""
    return torch.randn(8, 3, 10, 10)


@pytest.fixture
def optimized(tmp_path: Path) -> Callable[[Path], onnx.ModelProto]:
    """What ONNX Runtime makes of a file at load, with default options."""

    def read(path: Path) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3  # it warns that such a file is for this machine alone
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return onnx.load(tmp_path / "optimized.onnx")

    return read
