"""On a GPU: the same codes as on the CPU, exact agreement with the frozen model, half precisions, resumed runs.

These tests are skipped without a GPU. Integer sums are compared exactly, float sums within the precision of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import daqconvert as dq

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

WIDTHS = [(1, 1), (2, 2), (4, 4), (8, 8), (4, None)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def batches(count: int = 4, device: str = "cuda") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        target = torch.randint(0, 5, (16,), generator=generator)
        x = torch.randn(16, 3, 12, 12, generator=generator) + target.view(-1, 1, 1, 1) / 2
        found.append((x.to(device), target.to(device)))
    return found


def pair(w_bits: int, a_bits: int | None, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The same calibrated model on the CPU and on the GPU."""
    qmodel = dq.quantize(network(), w_bits=w_bits, a_bits=a_bits, **settings)
    dq.calibrate(qmodel, batches(2, "cpu"))
    return qmodel, dq.quantize(network().cuda(), w_bits=w_bits, a_bits=a_bits, **settings)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize(("w_bits", "a_bits"), WIDTHS)
@pytest.mark.parametrize("rounding", ["daq", "ste", "ewgs", "dsq"])
def test_outputs_and_gradients_are_those_of_the_cpu(w_bits: int, a_bits: int | None, rounding: str) -> None:
    """Layer by layer, each with the same input: else one other code in an early layer would change all that follow."""
    on_cpu, on_gpu = pair(w_bits, a_bits, rounding=rounding)
    on_gpu.load_state_dict(on_cpu.state_dict())
    for (name, here), there in zip(on_cpu.named_children(), on_gpu.children(), strict=True):
        if not hasattr(here, "weight_quantizer"):
            continue
        shape = (16, 16) if isinstance(here, nn.Linear) else (4, here.in_channels, 9, 9)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).relu()
        results = []
        for layer, device in ((here, "cpu"), (there, "cuda")):
            inputs = x.detach().clone().to(device).requires_grad_()
            out = layer(inputs)
            out.square().sum().backward()
            found = {key: p.grad.cpu() for key, p in layer.named_parameters() if p.grad is not None}
            results.append({"out": out.detach().cpu(), "input": inputs.grad.cpu(), **found})
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(
                results[1][key], value, rtol=2e-4, atol=2e-5 * float(value.abs().max()) + 1e-12, msg=f"{name} {key}"
            )


@pytest.mark.parametrize(("w_bits", "a_bits"), WIDTHS)
def test_frozen_is_trained(w_bits: int, a_bits: int | None) -> None:
    _, qmodel = pair(w_bits, a_bits)
    data = batches()
    dq.finetune(qmodel, data, epochs=2, progress=False)
    frozen = dq.freeze(qmodel)
    for x, _ in data:
        with torch.no_grad():
            assert torch.equal(frozen(x), qmodel(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_frozen_layers_give_the_codes_of_the_cpu(bits: int, tmp_path: Path) -> None:
    _, qmodel = pair(bits, bits)
    dq.finetune(qmodel, batches(), epochs=1, progress=False)
    dq.save(dq.freeze(qmodel), tmp_path / "model.artifact")
    here = dq.load(tmp_path / "model.artifact", network())
    there = dq.load(tmp_path / "model.artifact", network()).cuda()
    x = batches(1, "cpu")[0][0]
    with torch.no_grad():
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_learns_and_goes_on(precision: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "precision": precision, "ema": 0.9, "distill": 0.3, "clip_grad": 5.0, "oscillation": "freeze", "lr": 0.05,
        "checkpoint_steps": 5,
    }  # fmt: skip
    _, whole = pair(4, 4)
    first = dq.finetune(whole, batches(8), batches(2), epochs=6, out_dir=tmp_path / "a", progress=False, **fields)
    assert all(p.is_cuda for p in whole.parameters())
    assert first.history[-1]["train_loss"] < first.history[0]["train_loss"]

    class Stop(Exception):
        pass

    def stop(step: Any) -> None:
        if step.number == 20:
            raise Stop

    _, resumed = pair(4, 4)
    arguments: dict[str, Any] = {
        "epochs": 6,
        "out_dir": tmp_path / "b",
        "progress": False,
        **fields,
    }
    with pytest.raises(Stop):
        dq.finetune(resumed, batches(8), batches(2), on_step=stop, **arguments)
    second = dq.finetune(resumed, batches(8), batches(2), resume=True, **arguments)
    assert second.epochs == 6
    assert second.history[-1]["train_loss"] == pytest.approx(first.history[-1]["train_loss"], rel=0.05)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, of torch 2.11
def test_compiled_is_eager() -> None:
    _, eager = pair(4, 4)
    dq.calibrate(eager, batches(2))
    compiled = dq.quantize(network().cuda(), w_bits=4, a_bits=4)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile()
    x, target = batches(1)[0]
    found = []
    for model in (eager, compiled):
        model.train()
        nn.functional.cross_entropy(model(x), target).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_exported_from_the_gpu(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    _, qmodel = pair(4, 4)
    dq.calibrate(qmodel, batches(2))
    frozen = dq.freeze(qmodel)
    x = batches(1)[0][0]
    dq.export(frozen, tmp_path / "model.onnx", example_inputs=(x,))
    with torch.no_grad():
        assert frozen(x).is_cuda


def test_levels_are_chosen_and_blocks_rebuilt_there() -> None:
    qmodel = dq.quantize(network().cuda(), w_bits=3, a_bits=4, grid="integer", normalize=False)
    images = [x for x, _ in batches(4, "cpu")]
    result = dq.finetune(qmodel, images, recipe="fewshot", epochs=1, gptq=2, reconstruct=30, progress=False)
    rows = result.fitted["reconstruct"]
    assert [row.name for row in rows] == ["3", "6"]
    assert sum(row.after for row in rows) < sum(row.before for row in rows)
    assert all(p.is_cuda and bool(torch.isfinite(p).all()) for p in qmodel.parameters())
