"""The compiled kernels: built once, kept, shared by processes, done without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daqconvert.kernels import build, loading

SOURCE = Path(loading.__file__).parents[2]
needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing yet, with an empty cache."""
    monkeypatch.setattr(loading, "_loaded", None)
    monkeypatch.setenv("DAQCONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DAQCONVERT_KERNELS", raising=False)
    return tmp_path / "cache"


@needs_compiler
def test_built_at_first_use_said_once_and_found_by_the_next(fresh, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "daqconvert.kernels")
    first = loading.status()
    assert first.compiled and first.seconds > 0 and loading.library() is not None
    assert [record.message for record in caplog.records] == [
        f"built kernels in {first.seconds:.1f} s, kept as {first.reason}"
    ]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]  # nothing half-built beside it
    monkeypatch.setattr(loading, "_loaded", None)
    assert loading.status() == loading.Status(True, first.reason, 0.0)


@needs_compiler
def test_a_broken_file_in_the_cache_is_built_again(fresh, monkeypatch):
    cxx = build.compiler()
    assert cxx is not None
    path = build.library_path(cxx)
    path.parent.mkdir()
    path.write_bytes(b"no library")
    assert loading.status().compiled and path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CXX": "/no/such/compiler"}, "no C++ compiler found"),
        ({"DAQCONVERT_KERNELS": "0"}, "switched off"),
        ({"CXX": "false"}, "failed"),
    ],
    ids=["no compiler", "switched off", "a compiler that fails"],
)
def test_without_kernels_the_log_says_so_once(fresh, monkeypatch, caplog, environment, said):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert loading.library() is None and loading.library() is None
    assert not loading.status().compiled and said in loading.status().reason
    assert [record.levelname for record in caplog.records] == ["WARNING"] and said in caplog.text


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_error(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAQCONVERT_CACHE", str(tmp_path / "file"))
    assert not loading.status().compiled and "could not build" in loading.status().reason


@needs_compiler
def test_several_processes_may_build_at_once(tmp_path):
    code = "from daqconvert.kernels import status; s = status(); print(s.compiled, s.reason)"
    environment = {**os.environ, "DAQCONVERT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(SOURCE)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {process.communicate()[0] for process in running}
    assert len(said) == 1 and next(iter(said)).startswith("True")
    assert len(list((tmp_path / "cache").iterdir())) == 1
