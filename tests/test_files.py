"""Files and directories are written as a whole or not at all, whatever happens meanwhile."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from daqconvert.errors import ArtifactError, TrainingError
from daqconvert.files import (
    MACHINE,
    exchange_in_steps,
    remove_leftovers,
    replacing,
    replacing_directory,
    write_text,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="relies on what Linux does")


@contextmanager
def full_disk(room: int = 100):
    """No file grows beyond `room` bytes: writing fails part of the way, as on a full disk (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tree(folder: Path) -> dict[str, str | None]:
    """Every path below a folder, with the text of the files."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def dead_process() -> int:
    """The id of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# ---------------------------------------------------------------------------------------------------------- files


def test_a_file_is_written_replaced_and_gets_its_parents(tmp_path):
    for text in ("one", "two"):
        write_text(tmp_path / "a" / "b" / "file", text, TrainingError)
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/file": "two"}


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("file"), "one", TrainingError)
    write_text(Path("a/file"), "two", TrainingError)
    assert tree(tmp_path) == {"a": None, "a/file": "two", "file": "one"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_exception_in_the_block_leaves_everything_as_it_was(tmp_path, error, existing):
    path = tmp_path / "a" / "file" if not existing else tmp_path / "file"
    if existing:
        path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(error), replacing(path, TrainingError) as temporary:
        temporary.write_text("half")
        raise error("mine")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_full_disk(tmp_path, existing):
    path = tmp_path / "file" if existing else tmp_path / "a" / "b" / "file"
    if existing:
        path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(TrainingError, match="file: could not be written .File too large.*unchanged. Free some.*"), \
            full_disk():  # fmt: skip
        write_text(path, "x" * 1000, TrainingError, "Free some.")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("where", ["file/below", "file/deep/below", "folder", "x" * 300])
def test_a_place_where_no_file_can_be(tmp_path, where):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match="could not be written"):
        write_text(tmp_path / where, "text", ArtifactError)
    assert tree(tmp_path) == before


def test_a_block_that_writes_nothing(tmp_path):
    with (
        pytest.raises(TrainingError, match="could not be written .No such file"),
        replacing(tmp_path / "a" / "file", TrainingError),
    ):
        pass
    assert tree(tmp_path) == {}


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "folder").symlink_to("real/folder")
    write_text(tmp_path / "link", "one", TrainingError)
    for text in ("one", "two"):
        with replacing_directory(tmp_path / "folder", TrainingError) as temporary:
            (temporary / "file").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "one"
    assert (tmp_path / "folder").is_symlink() and (tmp_path / "real" / "folder" / "file").read_text() == "two"
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["file", "folder"]


def test_directories_that_somebody_else_uses_meanwhile_stay(tmp_path):
    with pytest.raises(ValueError), replacing(tmp_path / "a" / "b" / "file", TrainingError):
        (tmp_path / "a" / "other").write_text("theirs")
        raise ValueError
    assert tree(tmp_path) == {"a": None, "a/other": "theirs"}


# ----------------------------------------------------------------------------------------------------- directories


def write_folder(path, text="new", error=ArtifactError):
    with replacing_directory(path, error, "Free some.") as temporary:
        (temporary / "one").write_text(text)
        (temporary / "two").write_text(text)


def test_a_directory_is_written_and_replaced(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "a" / "folder", text)
    assert tree(tmp_path) == {"a": None, "a/folder": None, "a/folder/one": "two", "a/folder/two": "two"}


def test_what_the_old_directory_held_is_gone(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "file").write_text("old")
    write_folder(tmp_path / "folder")
    assert tree(tmp_path) == {"folder": None, "folder/one": "new", "folder/two": "new"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("fault", ["full", "error", "interrupt"])
def test_a_directory_that_could_not_be_written(tmp_path, existing, fault):
    path = tmp_path / "folder" if existing else tmp_path / "a" / "folder"
    if existing:
        write_folder(path, "old")
    before = tree(tmp_path)
    if fault == "full":
        with (
            pytest.raises(ArtifactError, match="folder: could not be written .File too large"),
            full_disk(),
        ):
            write_folder(path, "x" * 1000)
    else:
        error = ValueError if fault == "error" else KeyboardInterrupt
        with pytest.raises(error), replacing_directory(path, ArtifactError) as temporary:
            (temporary / "one").write_text("half")
            raise error
    assert tree(tmp_path) == before


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "folder", tmp_path / "file" / "a" / "folder"):
        with pytest.raises(ArtifactError, match="could not be written .Not a directory"):
            write_folder(path)
    assert tree(tmp_path) == {"file": "old"}


def test_exchanging_in_steps(tmp_path):
    """On systems that cannot exchange two names in one operation."""
    for name in ("new", "folder"):
        write_folder(tmp_path / name, name)
    exchange_in_steps(tmp_path / "new", tmp_path / "folder")
    assert tree(tmp_path) == {"folder": None, "folder/one": "new", "folder/two": "new"}
    with pytest.raises(FileNotFoundError):
        exchange_in_steps(tmp_path / "new", tmp_path / "folder")  # fails after the first step
    assert tree(tmp_path) == {"folder": None, "folder/one": "new", "folder/two": "new"}


# ------------------------------------------------------------------------------------------------------- leftovers


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path):
    dead, living = dead_process(), os.getppid()
    (tmp_path / f".file.{MACHINE}-{dead}-0123abcd.tmp").write_text("half")
    (tmp_path / f".file.{MACHINE}-{dead}-0123abce.tmp").mkdir()
    stay = [
        f".file.{MACHINE}-{living}-0123abcd.tmp",  # being written
        f".file.{'0' * 8}-{dead}-0123abcd.tmp",  # by another machine
        f".file.other.{MACHINE}-{dead}-0123abcd.old",  # of another file
        ".file.tmp",
        ".file.notes.tmp",
        "file.tmp",
    ]
    for name in stay:
        (tmp_path / name).write_text("theirs")
    write_text(tmp_path / "file", "new", TrainingError)
    assert sorted(tree(tmp_path)) == sorted([*stay, "file"])


def test_an_old_directory_that_was_moved_aside_comes_back(tmp_path):
    aside = f".folder.{MACHINE}-{dead_process()}-0123abcd.old"
    write_folder(tmp_path / aside, "old")
    remove_leftovers(tmp_path / "folder")
    assert tree(tmp_path) == {"folder": None, "folder/one": "old", "folder/two": "old"}
    write_folder(tmp_path / aside, "older")
    remove_leftovers(tmp_path / "folder")
    assert tree(tmp_path) == {"folder": None, "folder/one": "old", "folder/two": "old"}


WRITER = """
import sys
from pathlib import Path
from daqconvert.errors import ArtifactError
from daqconvert.files import replacing_directory
path, n = Path(sys.argv[1]), 0
while True:
    with replacing_directory(path, ArtifactError) as temporary:
        for name in ("one", "two"):
            (temporary / name).write_text(str(n))
    n += 1
    print(n, flush=True)
"""


@linux
def test_killed_at_any_moment_there_is_one_whole_directory(tmp_path, child_env):
    path = tmp_path / "folder"
    for attempt in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], env=child_env, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        deadline = time.monotonic() + 0.1 * attempt + 0.013
        while time.monotonic() < deadline:  # and all the time there is one, too
            assert path.is_dir()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert (path / "one").read_text() == (path / "two").read_text() != ""
    with suppress(ValueError), replacing_directory(path, ArtifactError):
        raise ValueError
    assert sorted(tree(tmp_path)) == ["folder", "folder/one", "folder/two"]


def test_two_writers_at_once(tmp_path):
    with replacing(tmp_path / "file", TrainingError) as first:
        first.write_text("first")
        write_text(tmp_path / "file", "second", TrainingError)
        assert (tmp_path / "file").read_text() == "second"
    assert tree(tmp_path) == {"file": "first"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_user_asked_for(tmp_path, umask):
    """A writer that makes its file for its owner alone, as safetensors does, changes nothing about that."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file", TrainingError) as temporary:
            temporary.write_text("a")
            temporary.chmod(0o600)
        with replacing_directory(tmp_path / "folder", TrainingError) as temporary:
            (temporary / "file").write_text("a")
            (temporary / "file").chmod(0o600)
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "file"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
