"""Saving where it cannot be done, or is interrupted: nothing half-written remains, an old artifact stays as it was."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.artifact import read_manifest
from daqconvert.errors import ArtifactError, FrozenError
from helpers.artifacts import MANIFEST, TENSORS, assert_same, frozen_of, small_network


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_model_that_is_not_frozen(tmp_path):
    model = small_network()
    for other in (model, dq.quantize(model)):
        with pytest.raises(FrozenError, match="is not frozen. Call daqconvert.freeze"):
            dq.save(other, tmp_path / "a")
    assert content(tmp_path) == {}


def make_file(path):
    path.write_text("mine")


def make_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def make_mixed(path):
    make_folder(path)
    (path / MANIFEST).write_text("{}")


TARGETS = {
    "a file": (make_file, "is a file; an artifact is a directory"),
    "a pipe": (os.mkfifo, "is a file; an artifact is a directory"),
    "another directory": (make_folder, r"exists and is no artifact \('notes.txt'\), which would be lost"),
    "an artifact and more": (make_mixed, r"exists and holds other files too \('notes.txt'\), which would be lost"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_what_is_there_is_not_lost(frozen, tmp_path, name, overwrite):
    make, told = TARGETS[name]
    make(tmp_path / "a")
    before = [(path, path.lstat().st_ino) for path in tmp_path.rglob("*")]
    with pytest.raises(ArtifactError, match=f"a: {told}.*Choose another path"):
        dq.save(frozen, tmp_path / "a", overwrite=overwrite)
    assert [(path, path.lstat().st_ino) for path in tmp_path.rglob("*")] == before


def test_an_artifact_is_replaced_only_when_asked(artifact, batch, tmp_path):
    before = content(tmp_path)
    other = frozen_of(small_network(), batch, w_bits=2, a_bits=2)
    with pytest.raises(ArtifactError, match="artifact: exists. Pass overwrite=True"):
        dq.save(other, artifact)
    assert content(tmp_path) == before
    dq.save(other, artifact, overwrite=True)
    assert_same(dq.load(artifact, model=small_network()), other, batch)
    assert sorted(content(tmp_path)) == ["artifact", f"artifact/{MANIFEST}", f"artifact/{TENSORS}"]


def test_half_an_artifact_can_be_replaced(artifact, frozen, batch):
    (artifact / MANIFEST).unlink()
    dq.save(frozen, artifact, overwrite=True)
    assert_same(dq.load(artifact, model=small_network()), frozen, batch)


def test_an_empty_directory_and_missing_parents(frozen, batch, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c", str(tmp_path / "text")):
        assert_same(dq.load(dq.save(frozen, path), model=small_network()), frozen, batch)


def test_the_current_directory_is_not_pulled_from_under_the_user(frozen, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "", tmp_path, "/"):
        with pytest.raises(ArtifactError, match="is the current directory or one above it"):
            dq.save(frozen, path)
    assert content(tmp_path) == {"here": None}
    dq.save(frozen, "artifact")
    assert sorted(content(tmp_path / "here")) == ["artifact", f"artifact/{MANIFEST}", f"artifact/{TENSORS}"]


@pytest.mark.parametrize("where", ["file/a", "file/deep/a", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be(frozen, tmp_path, where):
    make_file(tmp_path / "file")
    with pytest.raises(ArtifactError, match="could not be written|cannot be used|null character"):
        dq.save(frozen, f"{tmp_path}/{where}")
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("room", [0, 100, 3000], ids=["nothing", "part of the tensors", "part of the manifest"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_full_disk(artifact, batch, tmp_path, existing, room):
    other = frozen_of(small_network(), batch, w_bits=2, a_bits=2)
    path = artifact if existing else tmp_path / "a" / "b"
    before, limit = content(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    if existing:
        assert (artifact / TENSORS).stat().st_size < 3000 < (artifact / MANIFEST).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # Python ignores SIGXFSZ, so writing fails with EFBIG
    try:
        with pytest.raises(ArtifactError, match="could not be written .*File too large.*Free some space"):
            dq.save(other, path, overwrite=existing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert content(tmp_path) == before
    dq.save(other, path, overwrite=existing)
    assert_same(dq.load(path, model=small_network()), other, batch)


SAVER = """
import sys, torch
from torch import nn
import daqconvert as dq
model = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 2))
x, n = torch.randn(8, 8), 0
qmodel = dq.quantize(model, w_bits=4, a_bits=4)
dq.calibrate(qmodel, [x], method="minmax")
frozen = dq.freeze(qmodel)
while True:
    frozen[0].bias.fill_(n)
    frozen[2].bias.fill_(n)
    dq.save(frozen, sys.argv[1], overwrite=True)
    n += 1
    print(n, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="exchanges two directories in one step")
def test_killed_while_it_saves(tmp_path, child_env):
    path, skeleton = tmp_path / "a", nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 2))
    child = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)], env=child_env, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.readline()
    for _ in range(20):  # it saves all the time, and stops at another moment each time
        os.kill(child.pid, signal.SIGSTOP)
        loaded = dq.load(path, model=skeleton)
        assert torch.unique(torch.cat([loaded[0].bias, loaded[2].bias])).numel() == 1
        os.kill(child.pid, signal.SIGCONT)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    frozen = dq.load(path, model=skeleton)
    dq.save(frozen, path, overwrite=True)
    assert sorted(content(tmp_path)) == ["a", f"a/{MANIFEST}", f"a/{TENSORS}"]


def test_saved_over_the_artifact_it_was_loaded_from(artifact, frozen, batch):
    before = content(artifact)
    dq.save(dq.load(artifact, model=small_network()), artifact, overwrite=True)
    assert content(artifact) == before


def test_class_names_are_kept(frozen, batch, tmp_path):
    plain, named = dq.save(frozen, tmp_path / "plain"), dq.save(frozen, tmp_path / "named", classes=["café", "tea"])
    assert read_manifest(named).classes == ("café", "tea")
    assert read_manifest(plain).classes is None
    assert "classes" not in json.loads((plain / "daqconvert.json").read_text(encoding="utf-8"))
    assert torch.equal(*(dq.load(path, model=small_network())(*batch) for path in (named, plain)))
    for wrong in (["a\x1b[2J"], [""], ["a" * 401]):
        with pytest.raises(ArtifactError, match="classes: expected a list of short texts"):
            dq.save(frozen, tmp_path / "wrong", classes=wrong)
    assert not (tmp_path / "wrong").exists()


def test_nothing_is_saved_that_could_not_be_loaded(batch, tmp_path):
    """A name that the manifest may not hold, for it would be printed."""
    model = nn.Sequential()
    model.add_module("a\x1b[2J", nn.Conv2d(3, 4, 3))
    frozen = frozen_of(model, batch)
    with pytest.raises(ArtifactError, match=r"a.daqconvert.json: plan: expected printable texts, found 'a\\x1b\[2J'"):
        dq.save(frozen, tmp_path / "a")
    assert content(tmp_path) == {}
