"""`torch.compile`: one graph, the values and gradients of eager, and no new compilation when bounds move."""

from __future__ import annotations

import copy

import pytest
import torch

import daqconvert as dq
from helpers.converted_networks import NETWORKS, batch, quantized

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SMALL = ("beit", "bare", "linear", "conv")
slow = pytest.mark.slow
networks = [name if name in SMALL else pytest.param(name, marks=slow) for name in NETWORKS]
each_network = pytest.mark.parametrize("name", networks)


@pytest.mark.parametrize(
    "name", [n if n in (*SMALL, "swin", "encoder") else pytest.param(n, marks=slow) for n in NETWORKS]
)
@pytest.mark.parametrize("stage", ["quantized", pytest.param("frozen", marks=slow)])
def test_evaluation_is_one_graph_and_the_same_numbers(name, stage):
    model = quantized(name) if stage == "quantized" else dq.freeze(quantized(name))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(batch(name)), model(batch(name)))


def assert_eager_gradients(qmodel, x, rtol, atol):
    other = copy.deepcopy(qmodel)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for run, model in ((qmodel, qmodel), (compiled, other)):
        torch.manual_seed(0)
        run(x).square().mean().backward()
        assert any(p.grad is not None for p in model.parameters())
    for (key, p), q in zip(qmodel.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:  # sums of a fused backward come in another order
            assert torch.allclose(q.grad, p.grad, rtol=rtol, atol=atol * float(p.grad.abs().max())), key


@each_network
def test_training_gives_the_eager_gradients(name):
    assert_eager_gradients(quantized(name).train(), batch(name), rtol=1e-3, atol=1e-5)


@each_network
def test_plain_operations_give_the_eager_gradients(name):
    """A layer is compiled in plain operations where there are no kernels of ours: on a GPU, and here in float64."""
    assert_eager_gradients(quantized(name).double().train(), batch(name).double(), rtol=1e-9, atol=1e-9)


@each_network
def test_moved_bounds_and_another_batch_size_need_no_new_graph(name):
    qmodel = quantized(name)
    compiled = torch.compile(qmodel, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        before = compiled(batch(name, 7))  # no other size is 7: torch takes equal ones for the same
        for parameter in (p for key, p in qmodel.named_parameters() if key.endswith("quantizer.upper")):
            parameter.mul_(0.7)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = compiled(batch(name, 7))
            assert torch.equal(after, qmodel(batch(name, 7))) and not torch.equal(after, before)
            assert torch.equal(compiled(batch(name, 9)), qmodel(batch(name, 9)))
