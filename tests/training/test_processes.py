"""Several processes: the same weights as one process with the same global batch; bounds, stops and errors agree."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from daqconvert.errors import TrainingError
from daqconvert.training import evaluate, finetune
from helpers import two_processes
from helpers.children import environment, python
from helpers.clusters import Clusters
from helpers.two_processes import SAMPLES, model, trained

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# The gradient of a batch is a sum over its samples, and two processes add it up in another order: each addition is
# off by 2**-24 of its result. 50 steps of lr 0.02 with momentum 0.9 carry that on, by about the learning rate times
# the steps over 1 - momentum: 10, times 2**-24, times gradients of up to 10: 1e-5 of the weights, which are near 1.
TOLERANCE = 1e-5


def results(folder: Path, *command: str) -> list[dict]:
    done = python(*command, two_processes.__file__, folder, env=environment(1, tests=True))
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results of each of two processes."""
    return results(tmp_path_factory.mktemp("two"), "-W", "error")


def identical(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def check_close(found, expected) -> None:
    (state, history), (wanted, rows) = found, expected
    moved = model().state_dict()
    assert any((value - moved[key]).abs().max() > 0.05 for key, value in wanted.items() if value.is_floating_point())
    for key, value in state.items():
        assert torch.allclose(value.double(), wanted[key].double(), rtol=0, atol=TOLERANCE), key
    for ours, theirs in zip(history, rows, strict=True):
        assert (ours["epoch"], ours["step"], ours["lr"]) == (theirs["epoch"], theirs["step"], theirs["lr"])
        assert ours["val_top1"] == theirs["val_top1"]
        for key in ("train_loss", "val_loss"):
            assert ours[key] == pytest.approx(theirs[key], abs=TOLERANCE)


@pytest.mark.parametrize("which", ["trained", "accumulated"])
def test_two_processes_train_as_one_with_the_same_global_batch(found, which):
    """`accumulated` has a quarter of the batch on each process, twice."""
    assert identical(found[0][which][0], found[1][which][0])
    check_close(found[0][which], trained(1))


def test_calibration_agrees(found):
    assert identical(found[0]["calibration"]["state"], found[1]["calibration"]["state"])
    assert found[0]["calibration"]["mirrors"] == found[1]["calibration"]["mirrors"]
    assert all(ready for ready, *_ in found[0]["calibration"]["mirrors"])


def test_statistics_of_batch_norms_and_averages_agree(found):
    first, second = (result["batch norm"] for result in found)
    assert identical(first["state"], second["state"])
    assert not torch.equal(first["state"]["1.running_mean"], model().state_dict()["1.running_mean"])
    assert first["left"] == second["left"] == set()  # nothing of Accelerate's or DDP's stays on the model
    assert first["settings"] == second["settings"]


def test_all_stop_where_one_diverges(found):
    assert [result["poisoned"].partition("1 of 5")[2][:17] for result in found] == [": the loss is nan"] * 2


def test_all_stop_where_one_is_told_to(found):
    for result in found:
        assert "SIGTERM: training stopped" in result["stopped"]["said"]
        assert "epoch 2, step 3" in result["stopped"]["said"]  # the 15th forward: ten an epoch, two a step
        assert result["stopped"]["same"]


def test_all_hear_that_the_main_one_cannot_write(found):
    for result in found:
        assert result["unwritable"].startswith("TrainingError: out_dir")


def test_evaluation_is_shared_without_duplicates(found):
    alone = evaluate(model(), DataLoader(Clusters(SAMPLES), batch_size=12), topk=(1, 2))
    for result in found:
        assert result["evaluation"]["count"] == SAMPLES
        assert result["evaluation"]["topk"] == alone.topk
        assert result["evaluation"]["loss"] == pytest.approx(alone.loss, rel=1e-12)  # float64 sums, in another order


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_launchers(tmp_path, launcher):
    found = results(tmp_path, "-m", *launcher)
    check_close(found[1]["trained"], trained(1))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_what_takes_parameters_apart_is_refused(make, loader, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(TrainingError, match=f"{name} is not supported"):
        finetune(make(), loader(), epochs=1)
