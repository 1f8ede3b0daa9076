"""Checkpoints: what is written is read back, damage is found, a failed write leaves the old file."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import daqconvert as dq
from daqconvert.errors import DataError, TrainingError
from daqconvert.files import replacing, write_text
from daqconvert.training import finetune, load_weights
from daqconvert.training.checkpoint import digest, model_tensors, read_checkpoint, write_checkpoint

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "bool": torch.tensor(True),
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "int8": torch.tensor([[-1]], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


def test_round_trip(tmp_path):
    path, meta = tmp_path / "c.safetensors", {"lr": 0.1, "text": "gruess dich", "none": None, "loss": float("nan")}
    tied = {**TENSORS, "tied": TENSORS["a"]}
    write_checkpoint(path, tied, meta)
    found = read_checkpoint(path)
    assert found.tensors.keys() == tied.keys()
    assert all(torch.equal(value, found.tensors[key]) for key, value in tied.items())
    assert all(value.dtype == found.tensors[key].dtype for key, value in tied.items())
    assert json.dumps(found.meta) == json.dumps(meta)
    assert load_file(path)["a"].tolist() == TENSORS["a"].tolist()  # plain safetensors
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_digest_sees_values_names_shapes_and_text():
    a = {"x": torch.zeros(2, 3)}
    others = [({"x": torch.ones(2, 3)}, ""), ({"y": torch.zeros(2, 3)}, ""), ({"x": torch.zeros(3, 2)}, "")]
    others += [(a, "text"), ({"x": torch.zeros(2, 3, dtype=torch.int32)}, "")]
    assert len({digest(a), *(digest(tensors, text) for tensors, text in others)}) == 6


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, TENSORS, {"epochs_done": 1})
    return path


def rewrite(path, change):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata=header)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


ATTACKS = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-7]), "damaged"),
    "only the start": (lambda p: p.write_bytes(p.read_bytes()[:50]), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_text("hello, this is no checkpoint at all"), "damaged"),
    "a bit of a tensor": (lambda p: flip(p, -1), "do not match their SHA-256"),
    "a value": (lambda p: rewrite(p, lambda h, t: t["a"].add_(1)), "do not match their SHA-256"),
    "a name": (lambda p: rewrite(p, lambda h, t: t.update(b=t.pop("a"))), "do not match their SHA-256"),
    "a missing tensor": (lambda p: rewrite(p, lambda h, t: t.pop("a")), "do not match their SHA-256"),
    "metadata": (lambda p: rewrite(p, lambda h, t: h.update(json='{"epochs_done": 9}')), "do not match their SHA-256"),
    "newer": (lambda p: rewrite(p, lambda h, t: h.update(version="3")), "version 2, found '3'. Update daqconvert"),
    "no version": (lambda p: rewrite(p, lambda h, t: h.pop("version")), "version 2, found ''"),
    "other safetensors": (lambda p: save_file({"a": torch.zeros(1)}, p), "no checkpoint of daqconvert"),
    "missing": (lambda p: p.unlink(), "no such checkpoint"),
}


@pytest.mark.parametrize(("attack", "told"), ATTACKS.values(), ids=ATTACKS)
def test_damage_is_found(checkpoint, attack, told):
    attack(checkpoint)
    with pytest.raises(TrainingError, match=told):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["last.safetensors", "teacher.safetensors"])
@pytest.mark.parametrize("attack", ["truncated", "a bit of a tensor"])
def test_a_damaged_run_is_not_resumed(make, loader, tmp_path, name, attack):
    finetune(make(), loader(), out_dir=tmp_path, epochs=1)
    ATTACKS[attack][0](tmp_path / name)
    qmodel = make()
    before = {key: value.clone() for key, value in qmodel.state_dict().items()}
    with pytest.raises(TrainingError, match=f"{name}.*overwrite=True"):
        finetune(qmodel, loader(), out_dir=tmp_path, resume=True, epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in qmodel.state_dict().items())


def test_weights_of_another_model_are_refused(make, loader, tmp_path):
    finetune(make(), loader(), out_dir=tmp_path, epochs=1, distill=0.0)
    other = dq.quantize(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)), w_bits=2, a_bits=2)
    with pytest.raises(TrainingError, match=r"Sequential: 1: quantized only in the model; 4: .*and \d+ more"):
        load_weights(other, tmp_path / "last.safetensors")


def test_names_and_shapes_that_differ_are_named(make, loader, tmp_path):
    finetune(make(), loader(), out_dir=tmp_path, epochs=1, distill=0.0)
    more, fewer, wider = make(), make(), make()
    more[3] = nn.BatchNorm1d(16)
    fewer[1] = nn.Identity()
    wider[1] = nn.BatchNorm1d(17)
    for other, told in (
        (more, "3.weight: only in the model"),
        (fewer, "1.bias: only in the checkpoint"),
        (wider, r"1.weight: shape \(16,\) in the checkpoint, \(17,\) in the model"),
    ):
        with pytest.raises(TrainingError, match=f"does not fit Sequential: {told}"):
            load_weights(other, tmp_path / "last.safetensors")


def test_state_that_is_no_tensor_is_refused_before_any_work(make, loader, tmp_path):
    class Counting(nn.ReLU):
        def get_extra_state(self):
            return {"calls": 3}

    qmodel = make()
    qmodel[2] = Counting()
    with pytest.raises(TrainingError, match="2._extra_state' is a dict"):
        finetune(qmodel, loader(), out_dir=tmp_path / "run", epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_tied_weights_are_written_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Embedding(4, 4)
            self.b.weight = self.a.weight

    write_checkpoint(tmp_path / "c.safetensors", model_tensors(Tied()), {})
    assert {"model/a.weight", "model/b.weight"} < read_checkpoint(tmp_path / "c.safetensors").tensors.keys()


class FileSizeLimit:
    """Makes writes beyond some bytes fail, as on a full disk; the error is the kernel's own, not a mock."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_old_file(checkpoint):
    before = checkpoint.read_bytes()
    with FileSizeLimit(1000), pytest.raises(TrainingError, match=r"c.safetensors: could not be written.*unchanged"):
        write_checkpoint(checkpoint, {"big": torch.zeros(1000)}, {})
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == ["c.safetensors"]


def test_a_full_disk_in_epoch_2_and_then_resumed(make, loader, val_loader, tmp_path):
    options, full = {"epochs": 3, "distill": 0.0}, FileSizeLimit(2000)
    finetune(make(), loader(), val_loader, out_dir=tmp_path / "whole", **options)
    try:
        with pytest.raises(TrainingError, match=r"could not be written.*resume=True"):
            finetune(make(), loader(), val_loader, out_dir=tmp_path / "full", on_epoch=lambda row: full.__enter__(),
                     **options)  # fmt: skip
    finally:
        full.__exit__()
    assert read_checkpoint(tmp_path / "full" / "last.safetensors").meta["epochs_done"] == 1
    assert not list((tmp_path / "full").glob(".*"))
    finetune(make(), loader(), val_loader, out_dir=tmp_path / "full", resume=True, **options)
    a, b = (read_checkpoint(tmp_path / run / "last.safetensors").tensors for run in ("whole", "full"))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("where", ["/proc/daqconvert/run", "file/run", "file"])
def test_an_out_dir_that_cannot_be_written(make, loader, tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="out_dir .* cannot be used"):
        finetune(make(), loader(), out_dir=tmp_path / where, epochs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_out_dir_that_is_made_and_then_not_needed_is_removed(make, tmp_path):
    with pytest.raises(DataError):
        finetune(make(), [torch.zeros(2, 8)], out_dir=tmp_path / "a" / "b", epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_removed(make, loader, tmp_path):
    finetune(make(), loader(), out_dir=tmp_path, epochs=1)
    leftover = tmp_path / ".last.safetensors.12345.tmp"
    leftover.write_bytes(b"half")
    finetune(make(), loader(), out_dir=tmp_path, epochs=1, resume=True)
    assert not leftover.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug")], ids=repr)
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "log.csv"
    write_text(path, "old", TrainingError)
    with pytest.raises(type(error)), replacing(path, TrainingError) as temporary:
        temporary.write_text("ne")
        raise error
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]
