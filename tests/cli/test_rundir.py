"""The run directory as commands read it: damage is found and named."""

from __future__ import annotations

import dataclasses

import pytest

from daqconvert.cli import rundir


@pytest.mark.parametrize("name", ["config.json", "best.safetensors", "float.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "edited"])
def test_damaged_runs(daq, run, name, damage):
    file = run / name
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.write_text('{"job": {"model": "os:system"}}')
    message = daq("freeze", run, "--overwrite").fails()
    assert name in message or damage == "gone"


def test_a_run_is_the_same_job_in_another_folder(run, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    config = rundir.read_config(run)
    job = dataclasses.replace(config.job, data=f"{folder.name}/train", val=f"{folder.name}/val", checkpoint=None)
    rundir.write_config(run, dataclasses.replace(config, job=job))
    monkeypatch.chdir(tmp_path)
    _, opened = rundir.open_run(run, None, 4)
    assert len(opened.loaders.val.dataset) == 8
    assert rundir.read_config(run).job.data == str(folder / "train")


def test_the_name_of_a_data_set_is_no_path(run):
    config = rundir.read_config(run)
    rundir.write_config(run, dataclasses.replace(config, job=dataclasses.replace(config.job, data="torch/cifar10")))
    assert rundir.read_config(run).job.data == "torch/cifar10"


def test_a_data_set_with_a_name_is_found_again_from_another_folder(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = rundir.read_config(run)
    rundir.write_config(run, dataclasses.replace(config, job=dataclasses.replace(config.job, data="torch/cifar10")))
    monkeypatch.chdir(run)
    assert rundir.read_config(run).job.data_root == str(tmp_path / "data")
