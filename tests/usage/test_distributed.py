"""`DistributedDataParallel`: the plain model's gradients, its keys behind `module.`, the mean over two processes.

`fully_shard` (FSDP2): the plain model's losses, weights and state dict.
"""

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


SHARDED = """
import copy
import sys
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import daqconvert as dq

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
FULL = StateDictOptions(full_state_dict=True)
PAPER = {"normalize": True, "grid": "midrise", "granularity": "tensor"}
LSQ = {"rounding": "lsq", "grid": "twos", "granularity": "tensor"}


def made(settings):
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    bits = {"w_bits": 4, "a_bits": 4, "first": settings, "last": settings}
    return dq.quantize(nn.Sequential(*layers), **bits | settings)


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)


def train(model, optimizer, data):
    losses = []
    for x in data:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


found = {}
torch.manual_seed(1)
data = [torch.randn(16, 4) for _ in range(4)]
for name, settings in (("default", {}), ("paper", PAPER), ("lsq", LSQ)):
    plain = made(settings)
    dq.calibrate(plain, data, progress=False)
    plain.train()
    first = copy.deepcopy(plain)
    sharded = copy.deepcopy(plain)
    for module in sharded:
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = train(plain, optimizer_of(plain), data), train(sharded, optimizer_of(sharded), data)
    state = {key: value.clone() for key, value in get_model_state_dict(sharded, options=FULL).items()}
    again = made(settings)
    again.load_state_dict(state)
    set_model_state_dict(sharded, first.state_dict(), options=FULL)
    with torch.no_grad():
        back = torch.equal(sharded.eval()(data[0]), first.eval()(data[0]))
        same = torch.equal(again.eval()(data[0]), plain.eval()(data[0]))
    found[name] = {"losses": losses, "state": state, "plain": plain.state_dict(), "back": back, "same": same}

    early = made(settings)
    wrapped, optimizer = DistributedDataParallel(early), optimizer_of(early)  # both before `calibrate`
    dq.calibrate(early, data, progress=False)
    train(wrapped.train(), optimizer, data[rank::2])
    late = made(settings)
    dq.calibrate(late, data, progress=False)
    train(DistributedDataParallel(late).train(), optimizer_of(late), data[rank::2])
    found[name] |= {"early": early.state_dict(), "late": late.state_dict(), "start": first.state_dict()}
torch.save(found, f"{store}.{rank}")
distributed.destroy_process_group()
"""


def test_a_sharded_model_trains_as_the_plain_one_and_an_early_optimizer_sees_every_bound(tmp_path):
    command = [sys.executable, "-c", SHARDED]
    children = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment(tests=True))
        for rank in (0, 1)
    ]
    assert [child.wait(timeout=HANGING) for child in children] == [0, 0]
    ranks = [torch.load(tmp_path / f"store.{rank}") for rank in (0, 1)]
    for name in ranks[0]:
        for found in (rank[name] for rank in ranks):
            assert (
                found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6) and found["back"] and found["same"]
            )
            for key, value in found["plain"].items():  # FSDP2 has the mean of two equal gradients
                assert torch.allclose(found["state"][key].float(), value.float(), rtol=1e-6, atol=1e-7), (name, key)
        moved = 0
        for key, value in ranks[0][name]["early"].items():
            assert torch.equal(value, ranks[1][name]["early"][key]), (name, key)
            assert torch.equal(value, ranks[0][name]["late"][key]), (name, key)
            lower = key.endswith("input_quantizer.lower")
            moved += lower and not torch.equal(value, ranks[0][name]["start"][key])
            assert not lower or value.shape == (1,)
        assert moved == (name != "lsq")  # the one signed input, that of the model, has learned its lower bound
