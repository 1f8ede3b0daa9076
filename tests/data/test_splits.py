"""The data sets behind the names that a user gives."""

from __future__ import annotations

import pytest

from daqconvert.data import open_splits
from daqconvert.errors import DataError
from helpers.images import TWO_SPLITS, jpeg


@pytest.mark.parametrize("counts", [TWO_SPLITS, {"cat": 20, "dog": 10}], ids=["two splits", "one"])
def test_the_folder_one_stands_in_has_a_name(make_folder, monkeypatch, counts):
    monkeypatch.chdir(make_folder(counts))
    assert open_splits(".").description.startswith("folder: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "there is no such folder or file"),
        ("torch/cifar11", r"no such data set\. Nearest: cifar10"),
        ("tfds/cifar10", "streamed data sets"),
        ("cifar10", r"Nearest: torch/cifar10"),
    ],
)
def test_unknown_data(data, message):
    with pytest.raises(DataError, match=message):
        open_splits(data)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="a file of another kind"):
        open_splits(tmp_path / "a.txt")


def test_timm_data_set_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"torch/cifar10: its train split could not be read .* allow the download"):
        open_splits("torch/cifar10", data_root=tmp_path)


@pytest.mark.parametrize("order", ["up", "down", "blocks", "late"])
def test_rows_that_lie_by_class_are_held_out_by_class(make_parquet, order):
    labels = {
        "up": [0] * 4 + [1] * 4 + [2] * 4, "down": [2] * 4 + [1] * 4 + [0] * 4, "blocks": [1] * 4 + [2] * 4 + [0] * 4,
        "late": [0, 1, 1, 0, 1, 1, 0, 0] + [2] * 4,
    }[order]  # fmt: skip
    splits = open_splits(make_parquet([jpeg(i) for i in range(12)], labels), holdout=6)
    held, rest = ([label for _, label in part] for part in (splits.val, splits.train))
    assert sorted(held) == sorted(rest) == [0, 0, 1, 1, 2, 2]
    assert "of every class some are held out" in splits.description


def test_of_mixed_rows_the_last_are_held_out(make_parquet):
    labels = [0, 1, 1, 0, 1, 0]
    splits = open_splits(make_parquet([jpeg(i) for i in range(6)], labels), holdout=2)
    assert [label for _, label in splits.val] == [1, 0]
    assert splits.description == "images.parquet: rows 0 to 3 for training, 4 to 5 held out"
