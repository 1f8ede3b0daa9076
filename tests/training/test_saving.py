"""The last checkpoints are kept, and a run can go on from each; a run that a part has ended early stays ended."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from daqconvert.errors import TrainingError
from daqconvert.training import finetune, load_weights, saving
from daqconvert.training.checkpoint import digest, read_checkpoint
from daqconvert.training.parts.assembly import parts_for
from daqconvert.training.run import Part
from helpers.checkpoints import same

OPTIONS = {"epochs": 3, "lr": 0.05, "distill": 0.0}  # of three steps each


def kept(folder) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").glob("*"))


def step_of(path) -> int:
    return read_checkpoint(path).meta["position"]["number"]


@pytest.mark.parametrize(
    ("keep", "every", "expected"),
    [(1, 0, []), (2, 0, [6]), (4, 0, [0, 3, 6]), (3, 2, [6, 8]), (9, 2, [0, 2, 3, 4, 6, 8])],
)
def test_the_last_few_are_kept(make, loader, tmp_path, keep, every, expected):
    finetune(make(), loader(), out_dir=tmp_path, keep=keep, checkpoint_steps=every, **OPTIONS)
    assert kept(tmp_path) == [f"step-{step:08d}.safetensors" for step in expected]
    assert [step_of(tmp_path / "checkpoints" / name) for name in kept(tmp_path)] == expected
    assert step_of(tmp_path / "last.safetensors") == 9
    assert not (tmp_path / "checkpoints").exists() or keep > 1


def test_a_file_system_without_links(make, loader, tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    assert kept(tmp_path) == ["step-00000006.safetensors"]
    assert step_of(tmp_path / "checkpoints" / kept(tmp_path)[0]) == 6


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_checkpoint_names_the_newest_good_one(make, loader, tmp_path, damage):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        finetune(make(), loader(noise=0.3), out_dir=folder, keep=4, checkpoint_steps=2, **OPTIONS)
    last, newest, good = parts / "last.safetensors", *(parts / "checkpoints" / name for name in kept(parts)[:0:-1])
    newest.write_bytes(newest.read_bytes()[:-5])
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:-5])
    with pytest.raises(TrainingError) as caught:
        finetune(make(), loader(noise=0.3), out_dir=parts, resume=True, keep=4, checkpoint_steps=2, **OPTIONS)
    assert f"{good} is whole: to go on from there, cp {good} {last}, then resume=True." in str(caught.value)
    shutil.copy(good, last)
    finetune(make(), loader(noise=0.3), out_dir=parts, resume=True, keep=4, checkpoint_steps=2, **OPTIONS)
    assert same(whole / "last.safetensors", last)


def test_a_run_of_an_earlier_version_is_not_resumed_but_loaded(make, loader, tmp_path):
    qmodel = make()
    finetune(qmodel, loader(), out_dir=tmp_path, **OPTIONS)
    path = tmp_path / "last.safetensors"
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    meta, tensors = json.loads(header["json"]), load_file(path)
    del meta["position"]
    text = json.dumps(meta)
    save_file(tensors, path, metadata={**header, "version": "1", "json": text, "sha256": digest(tensors, text)})
    with pytest.raises(TrainingError, match="was written by an earlier version.*load_weights"):
        finetune(make(), loader(), out_dir=tmp_path, resume=True, **OPTIONS)
    other = make()
    load_weights(other, path)
    assert all(torch.equal(value, qmodel.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision: 'no' in the run, 'bf16' now"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "accumulate: 1 in the run, 2 now"),
    ],
    ids=["precision", "accumulate"],
)
def test_another_launch_is_refused(make, loader, tmp_path, monkeypatch, environment, told):
    finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(TrainingError, match=told):
        finetune(make(), loader(), out_dir=tmp_path, resume=True, **OPTIONS)


class Counting(Part):
    """A part with state, which ends the run after two epochs and changes the model at the end."""

    name = "counting"

    def __init__(self, run) -> None:
        self.run = run
        self.calls, self.seen = [], torch.zeros(())

    def start(self):
        self.calls.append("start")

    def after_step(self, step):
        self.seen = self.seen + step.number

    def after_epoch(self, row):
        if row["epoch"] == 2:
            self.run.stop = "enough"

    def finish(self):
        self.calls.append("finish")
        with torch.no_grad():
            self.run.model[0].bias.fill_(7.0)

    def tensors(self):
        return {"seen": self.seen}

    def meta(self):
        return len(self.calls)

    def load(self, tensors, meta):
        self.calls.append(f"load {meta}")
        self.seen = tensors["seen"].clone()


@pytest.fixture
def counting(monkeypatch):
    made = []

    def parts(run):
        made.append(Counting(run))
        return [*parts_for(run), made[-1]]

    monkeypatch.setattr(saving, "parts_for", parts)
    return made


def test_parts_act_are_kept_and_end_the_run(make, loader, tmp_path, counting):
    result = finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    assert (result.epochs, result.stop) == (2, "enough")
    assert "stopped early: enough" in str(result)
    assert counting[0].calls == ["start", "finish"]
    checkpoint = read_checkpoint(tmp_path / "last.safetensors")
    assert checkpoint.tensors["part/counting/seen"] == 21.0  # steps 1 to 6
    assert (checkpoint.tensors["model/0.bias"] == 7.0).all()
    before = (tmp_path / "last.safetensors").read_bytes()
    qmodel = make()
    result = finetune(qmodel, loader(), out_dir=tmp_path, resume=True, **OPTIONS)
    assert (result.epochs, result.stop) == (2, "enough")
    assert (qmodel[0].bias == 7.0).all()
    assert counting[1].calls == ["start", "load 2"]
    assert (tmp_path / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("every", "told"),
    [
        (4, "epoch 2, step 3 of 3: the loss is nan.*holds the state after epoch 2, step 1"),
        (1, "epoch 2: after it 1.running_var holds NaN.*holds the state after epoch 2, step 1"),
    ],
    ids=["loss", "statistics"],
)
def test_nan_in_the_middle_of_an_epoch(make, loader, tmp_path, every, told):
    qmodel = make()

    def poison(step):
        if step.number == 5:
            with torch.no_grad():
                qmodel[1].running_var.fill_(float("nan"))

    options = {**OPTIONS, "checkpoint_steps": every, "batch_norm": "freeze", "on_step": poison}
    with pytest.raises(TrainingError, match=told):
        finetune(qmodel, loader(), out_dir=tmp_path, **options)
    assert step_of(tmp_path / "last.safetensors") == 4
