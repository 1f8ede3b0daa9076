"""`daqconvert finetune` on two processes: one speaks and writes."""

from __future__ import annotations

import json

import pytest

import daqconvert as dq
from helpers.children import environment, python

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    "accelerate": (  # with --cpu it would start one process, unless by MPI
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ),
}  # fmt: skip
TINY = ("--float-epochs", "1", "--epochs", "1", "--batch-size", "128", "--no-onnx", "--json")


def launch(name, arguments):
    return python("-m", *LAUNCHERS[name], "-m", "daqconvert", "finetune", *arguments, env=environment(threads=1))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(launcher, tmp_path):
    run = tmp_path / "run"
    done = launch(launcher, ("--out", run, *TINY))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads((run / "summary.json").read_text())
    assert done.stderr.count("float: top-1") == 1
    assert "find_unused_parameters" not in done.stderr  # torch's warning that it looks for what is not there
    assert done.stderr.count("1347 images for training, 450 held out, on 2 processes") == 1
    (row,) = (run / "log.csv").read_text().splitlines()[1:]
    assert row.split(",")[:2] == ["1", "5"]  # ten batches of 128, shared by two
    assert dq.load(run / "artifact") is not None
    assert not [path for path in run.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    done = launch("torchrun", ("--out", tmp_path / "run", "--exclude", "layer9.*"))
    assert done.returncode != 0
    assert done.stderr.count('"layer9.*" matches no layer') == 1
    assert not (tmp_path / "run").exists()
