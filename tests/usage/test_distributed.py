"""`DistributedDataParallel`: the plain model's gradients, its keys behind `module.`, the mean over two processes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from helpers.children import HANGING, environment
from helpers.converted_networks import NETWORKS, batch, quantized


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_plain_models(name, group):
    plain = quantized(name).train()
    wrapped = DistributedDataParallel(copy.deepcopy(plain))
    assert list(wrapped.state_dict()) == [f"module.{key}" for key in plain.state_dict()]
    for step in (1, 2):  # a parameter that takes no part is told by the second step
        torch.manual_seed(step)
        plain(batch(name, seed=step)).square().mean().backward()
        torch.manual_seed(step)
        wrapped(batch(name, seed=step)).square().mean().backward()
    for (key, p), q in zip(plain.named_parameters(), wrapped.module.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or torch.equal(q.grad, p.grad), key


PROGRAM = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from helpers.converted_networks import batch, quantized

rank, store, name = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = DistributedDataParallel(quantized(name).train())
model(batch(name, seed=rank)).square().mean().backward()
gradients = {key: p.grad for key, p in model.module.named_parameters() if p.grad is not None}
torch.save(gradients, f"{store}.{rank}")
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit", "encoder", "bare"])
def test_two_processes_take_the_mean(name, tmp_path):
    command = [sys.executable, "-c", PROGRAM]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), name], env=environment(tests=True))
        for rank in (0, 1)
    ]
    assert [child.wait(timeout=HANGING) for child in children] == [0, 0]
    found = [torch.load(tmp_path / f"store.{rank}") for rank in (0, 1)]
    alone = []
    for rank in (0, 1):
        model = quantized(name).train()
        model(batch(name, seed=rank)).square().mean().backward()
        alone.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == alone[0].keys()
    for key, gradient in found[0].items():
        mean = (alone[0][key] + alone[1][key]) / 2
        assert torch.equal(gradient, found[1][key]), key
        assert torch.allclose(gradient, mean, rtol=1e-5, atol=1e-6 * float(mean.abs().max())), key
