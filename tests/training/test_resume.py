"""A resumed run is the same as one without interruption, bit for bit, with shuffling, augmentation and dropout."""

import csv

import pytest
import torch

from daqconvert.errors import DaqError, TrainingError
from daqconvert.training import finetune
from daqconvert.training.checkpoint import read_checkpoint, write_checkpoint
from daqconvert.training.recipes.named import BEFORE
from helpers.checkpoints import same

OPTIONS = {"epochs": 3, "lr": 0.05}


def files_in(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


GONE, STOPPED = OSError("disk gone"), KeyboardInterrupt()
GENERATOR, WORKERS = {"generator": torch.Generator()}, {"num_workers": 2}


@pytest.mark.parametrize(
    ("loaders", "error", "at_pass", "fresh"),
    [
        pytest.param({}, GONE, 3, True, id="loader error in epoch 2"),
        pytest.param({}, STOPPED, 4, True, id="keyboard in epoch 3"),
        pytest.param({}, STOPPED, 2, True, id="keyboard in epoch 1"),
        pytest.param({}, STOPPED, 1, True, id="keyboard in calibration"),
        pytest.param({}, STOPPED, 3, False, id="same model, in epoch 2"),
        pytest.param({}, STOPPED, 2, False, id="same model, in epoch 1"),
        pytest.param(GENERATOR, STOPPED, 3, True, id="own generator"),
        pytest.param(WORKERS, STOPPED, 3, True, id="workers"),
        pytest.param({**WORKERS, **GENERATOR, "persistent_workers": True}, GONE, 3, True, id="persistent workers"),
    ],
)
def test_resumed_is_uninterrupted(make, breaking, val_loader, tmp_path, loaders, error, at_pass, fresh):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    noisy = {"noise": 0.3, **loaders}
    finetune(make(), breaking(None, 0, **noisy), val_loader, out_dir=whole, **OPTIONS)
    qmodel = make()
    with pytest.raises(type(error)):
        finetune(qmodel, breaking(error, at_pass, **noisy), val_loader, out_dir=parts, **OPTIONS)
    torch.rand(5)  # another process starts with another random state
    qmodel = make() if fresh else qmodel
    result = finetune(qmodel, breaking(None, 0, **noisy), val_loader, out_dir=parts, resume=True, **OPTIONS)
    assert result.epochs == 3
    assert same(whole / "last.safetensors", parts / "last.safetensors")
    assert same(whole / "best.safetensors", parts / "best.safetensors")
    state = read_checkpoint(whole / "best.safetensors").part("model/")
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())


@pytest.mark.parametrize("distill", [0.0, 1.0])
def test_resumed_with_and_without_a_teacher(make, make_float, breaking, tmp_path, distill):
    options = {**OPTIONS, "distill": distill, "teacher": make_float() if distill else None, "batch_norm": "freeze"}
    finetune(make(), breaking(None, 0), out_dir=tmp_path / "whole", **options)
    with pytest.raises(OSError, match="gone"):
        finetune(make(), breaking(OSError("gone"), 3), out_dir=tmp_path / "parts", **options)
    finetune(make(), breaking(None, 0), out_dir=tmp_path / "parts", resume=True, **options)
    assert same(tmp_path / "whole" / "last.safetensors", tmp_path / "parts" / "last.safetensors")
    assert not (tmp_path / "whole" / "teacher.safetensors").exists()


def test_the_log_drops_what_is_trained_again(make, breaking, loader, tmp_path):
    with pytest.raises(OSError, match="gone"):
        finetune(make(), breaking(OSError("gone"), 4), out_dir=tmp_path, **OPTIONS)
    log = tmp_path / "log.csv"
    log.write_text(log.read_text() + "3,9,0.1,0.1,5.0,,,,1,1\n4,12,0.")  # as if written before the checkpoint
    finetune(make(), loader(), out_dir=tmp_path, resume=True, **OPTIONS)
    with log.open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert log.read_text().count("epoch,") == 1


def test_killed_between_best_and_last(make, loader, val_loader, tmp_path, monkeypatch):
    """`best` may be an epoch ahead of `last`; then the epoch is trained again, and both are as they should be."""
    from daqconvert.training import saving

    whole, parts, write = tmp_path / "whole", tmp_path / "parts", saving.write_checkpoint
    finetune(make(), loader(), val_loader, out_dir=whole, **OPTIONS)

    def killed(path, tensors, meta, before=None):
        if path.name == "last.safetensors" and meta["epochs_done"] == 1:
            raise KeyboardInterrupt
        write(path, tensors, meta, before)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "write_checkpoint", killed)
        finetune(make(), loader(), val_loader, out_dir=parts, **OPTIONS)
    assert read_checkpoint(parts / "best.safetensors").meta["epochs_done"] == 1
    assert read_checkpoint(parts / "last.safetensors").meta["epochs_done"] == 0
    finetune(make(), loader(), val_loader, out_dir=parts, resume=True, **OPTIONS)
    assert all(same(whole / name, parts / name) for name in ("best.safetensors", "last.safetensors"))


def test_a_finished_run_is_loaded(make, loader, tmp_path):
    finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    before = (tmp_path / "last.safetensors").read_bytes()
    log = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv").unlink()
    qmodel = make()
    result = finetune(qmodel, loader(), out_dir=tmp_path, resume=True, **OPTIONS)
    assert result.epochs == len(result.history) == 3
    assert (tmp_path / "log.csv").read_text() == log
    assert (tmp_path / "last.safetensors").read_bytes() == before
    state = read_checkpoint(tmp_path / "last.safetensors").part("model/")
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())
    assert qmodel[0].enabled


def test_resume_where_there_is_no_run_starts_one(make, loader, tmp_path):
    assert finetune(make(), loader(), out_dir=tmp_path / "new", resume=True, epochs=1).epochs == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lr": 0.06}, "lr: 0.05 in the run, 0.06 now"),
        ({"epochs": 4, "seed": 1}, "epochs: 3 in the run, 4 now; seed: 0 in the run, 1 now"),
        ({"distill": 0.0}, "distill: 0.5 in the run, 0.0 now; teacher: the model's own float copy in the run, none"),
        ({"teacher": torch.nn.Linear(8, 3)}, "teacher: the model's own float copy in the run, one passed"),
        ({"batch_size": 7}, "batch_size: 64 in the run, 7 now"),
    ],
    ids=["lr", "epochs and seed", "distill", "teacher", "batch size"],
)
def test_another_recipe_is_refused(make, loader, tmp_path, change, told):
    finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    before = files_in(tmp_path)
    with pytest.raises(TrainingError, match=rf"belongs to another run: {told}"):
        finetune(make(), loader(), out_dir=tmp_path, resume=True, **{**OPTIONS, **change})
    assert files_in(tmp_path) == before


def test_a_run_from_before_a_field_was_there_had_none_of_it(make, loader, tmp_path):
    options = {**OPTIONS, "final_a_sigma": 0.0}
    finetune(make(), loader(), out_dir=tmp_path, **options)
    path = tmp_path / "last.safetensors"
    checkpoint = read_checkpoint(path)
    meta = {**checkpoint.meta, "recipe": {k: v for k, v in checkpoint.meta["recipe"].items() if k not in BEFORE}}
    del meta["fitted"]
    write_checkpoint(path, checkpoint.part(""), meta)
    assert finetune(make(), loader(), out_dir=tmp_path, resume=True, **options).epochs == 3
    with pytest.raises(TrainingError, match="final_a_sigma: 0.0 in the run, 2.0 now"):
        finetune(make(), loader(), out_dir=tmp_path, resume=True, **OPTIONS)


def test_another_teacher_or_loader_is_refused(make, loader, tmp_path):
    teachers = [torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)]
    finetune(make(), loader(), out_dir=tmp_path, teacher=teachers[0], **OPTIONS)
    with pytest.raises(TrainingError, match="teacher: one passed .* in the run, one passed .* now"):
        finetune(make(), loader(), out_dir=tmp_path, resume=True, teacher=teachers[1], **OPTIONS)
    with pytest.raises(TrainingError, match="train_loader: 3 batches in the run, 1 now.*own float copy now"):
        finetune(make(), list(loader())[:1], out_dir=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize("file", ["last.safetensors", "teacher.safetensors"])
def test_another_models_checkpoint_is_refused_and_the_model_left_alone(make, loader, tmp_path, file):
    for bits in (2, 3):
        finetune(make(bits=bits), loader(), out_dir=tmp_path / str(bits), **OPTIONS)
    (tmp_path / "2" / file).replace(tmp_path / "3" / file)
    qmodel = make(bits=3)
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    with pytest.raises(TrainingError, match=f"{file}: .*4: a_bits = 2 in the checkpoint, 3 in the model"):
        finetune(qmodel, loader(), out_dir=tmp_path / "3", resume=True, **OPTIONS)
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())


def test_an_out_dir_in_use(make, loader, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="exists and is not empty. Pass overwrite=True"):
        finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    finetune(make(), loader(), [*loader()], out_dir=tmp_path, overwrite=True, **OPTIONS)
    with pytest.raises(TrainingError, match="Pass resume=True to go on, overwrite=True to start again"):
        finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    finetune(make(), loader(), out_dir=tmp_path, overwrite=True, epochs=1, distill=0.0)
    # best and teacher of the old run are gone
    names = ["checkpoints", "last.safetensors", "log.csv", "notes.txt", "recipe.toml", "report.html"]
    names += ["snapshots.jsonl", "steps.csv", "tensorboard"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000000.safetensors"]


def test_a_wrong_call_with_overwrite_loses_nothing(make, loader, tmp_path):
    finetune(make(), loader(), out_dir=tmp_path, **OPTIONS)
    before = files_in(tmp_path)
    for wrong in ({"lr": -1}, {"schedule": "bogus"}):
        with pytest.raises(DaqError):
            finetune(make(), loader(), out_dir=tmp_path, overwrite=True, **wrong)
    with pytest.raises(DaqError, match="expected a target"):
        finetune(make(), [torch.zeros(2, 8)], out_dir=tmp_path, overwrite=True)
    assert files_in(tmp_path) == before
