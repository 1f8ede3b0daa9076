"""A tiny data set and one finished run on it, shared by the tests of all commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from daqconvert.cli import app


class Result:
    """What a command gave back: exit code, standard output and standard error."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def fails(self, code: int = 2) -> str:
        """The one paragraph on standard error, its white space made single blanks."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.out == ""
        assert "Traceback" not in self.err
        return " ".join(self.err.split())


@pytest.fixture(scope="session")
def daq() -> Callable[..., Result]:
    """Run `daqconvert ARGUMENTS...`."""
    return lambda *arguments: Result(arguments)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes that a network can tell apart: dark and light ones; 12 for training, 8 for validation."""
    root = tmp_path_factory.mktemp("data") / "folder"
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name, low in (("dark", 0), ("light", 128)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(low, low + 100, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")
    return root


@pytest.fixture(scope="session")
def tiny(folder: Path) -> tuple[str, ...]:
    """Arguments of a job of a few seconds."""
    return ("test_resnet", "--data", str(folder), "--float-epochs", "2", "--epochs", "2", "--batch-size", "6")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, daq: Callable[..., Result], tiny: tuple[str, ...]) -> Path:
    """A finished run; not to be changed."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("runs") / "finished"
    found = daq("finetune", *tiny, "--out", path, "--w-bits", "4", "--a-bits", "4", "--json")
    assert found.code == 0, found.err
    (path.parent / "stdout.json").write_text(found.out)
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`module:function` of a module in the current folder that says so when it is imported."""
    monkeypatch.chdir(tmp_path)
    name = f"own_model_{os.getpid()}_{abs(hash(tmp_path.name))}"
    (tmp_path / f"{name}.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('imported').touch()\n"
        "def build(width=4):\n"
        "    torch.manual_seed(0)\n"
        "    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3),\n"
        "              torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 2)]\n"
        "    return torch.nn.Sequential(*layers)\n"
    )
    return f"{name}:build"
