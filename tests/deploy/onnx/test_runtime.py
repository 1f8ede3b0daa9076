"""ONNX Runtime on torch tensors."""

import pytest
import torch
from torch import nn

from daqconvert.deploy.exporting import export_float
from daqconvert.deploy.onnx.runtime import OnnxModel, time_session
from daqconvert.errors import ExportError


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x, gain):
        return self.a(x) * gain, self.a(x)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("runtime") / "two.onnx"
    model = Two().eval()
    export_float(model, path, (torch.randn(2, 4), torch.randn(2, 1)))
    return model, OnnxModel(path, threads=1)


def test_called_like_the_model(opened):
    model, session = opened
    x, gain = torch.randn(5, 4), torch.randn(5, 1)
    with torch.no_grad():
        wanted = model(x, gain)
    for found in (session(x, gain), session(x, gain=gain), session(gain=gain, x=x), session(x.double(), gain)):
        assert isinstance(found, tuple)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_names(opened):
    assert opened[1].input_names == ["x", "gain"]
    assert opened[1].output_names == ["output_0", "output_1"]


def test_too_few_tensors(opened):
    with pytest.raises(ExportError, match=r"takes 2 tensors \(x, gain\), found 1"):
        opened[1](torch.randn(2, 4))


def test_unknown_name(opened):
    with pytest.raises(ExportError, match=r"no input 'gian'; its inputs are x, gain\. Nearest: gain"):
        opened[1](torch.randn(2, 4), gian=torch.ones(2, 1))


def test_wrong_shape(opened):
    with pytest.raises(ExportError, match="ONNX Runtime cannot run the model"):
        opened[1](torch.randn(2, 5), torch.randn(2, 1))


def test_time_is_per_image(opened, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    x = torch.randn(4, 4)
    assert time_session(opened[1], x, torch.ones(4, 1), repeats=3) == 0.25  # one tick a call, four images
