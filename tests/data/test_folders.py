"""Images in folders: how one folder is split, how many are held out, and folders that cannot be used."""

from __future__ import annotations

import pytest

from daqconvert.data import open_splits
from daqconvert.data.folders import holdout_count
from daqconvert.errors import DataError
from helpers.images import TWO_SPLITS


def test_a_class_that_val_lacks_keeps_the_numbers(make_folder):
    splits = open_splits(make_folder({"train/a": 2, "train/b": 2, "train/c": 2, "validation/c": 2}))
    assert [label for _, label in splits.val] == [2, 2]


def test_one_folder_is_split_by_class(make_folder):
    root = make_folder({"cat": 20, "dog": 10})
    splits = open_splits(root, holdout=0.3)
    train, val = (set(part.indices) for part in (splits.train, splits.val))
    assert train.isdisjoint(val)
    assert train | val == set(range(30))
    labels = [splits.val[index][1] for index in range(len(splits.val))]
    assert (labels.count(0), labels.count(1)) == (6, 3)
    assert val == set(open_splits(root, holdout=9).val.indices)
    assert val != set(open_splits(root, holdout=9, seed=1).val.indices)


@pytest.mark.parametrize(("holdout", "count"), [(None, 10), (0.005, 1), (7, 7), (0.5, 50)])
def test_holdout(holdout, count):
    assert holdout_count(holdout, 100, "here") == count


@pytest.mark.parametrize("holdout", [0, 1.0e9, 100, -3, 2.5, float("nan"), float("inf")])
def test_impossible_holdout(holdout):
    with pytest.raises(DataError, match="here: cannot hold out"):
        holdout_count(holdout, 100, "here")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train/cat": 1, "train/dog": 1}, r"it has train/, expected both train/ and val/"),
        ({"val/cat": 1}, r"it has val/, expected both"),
        ({"train/cat": 1, "train/dog": 0, "val/cat": 1}, r"train: no images of class 'dog'"),
        ({"train/cat": 1, "val/cats": 1}, r"val: class 'cats' is not among those trained on\. Nearest: cat"),
        ({"train/cat": 0, "val/cat": 1}, r"train: no images in it"),
        ({"cat": 0}, r"no images in it"),
    ],
    ids=["no val", "no train", "empty class", "unknown class", "empty train", "empty folder"],
)
def test_bad_folders(make_folder, counts, message):
    with pytest.raises(DataError, match=message):
        open_splits(make_folder(counts))


def test_folder_with_nothing(tmp_path):
    with pytest.raises(DataError, match="found no folder in it"):
        open_splits(tmp_path)


def test_holdout_beside_a_val_folder_is_refused(make_folder):
    with pytest.raises(DataError, match="its own val/"):
        open_splits(make_folder(TWO_SPLITS), holdout=0.1)


def test_what_systems_and_notebooks_leave_is_no_class(make_folder):
    path = make_folder(
        {"cat": 4, "dog": 4, ".git": 1, ".ipynb_checkpoints": 1, "__MACOSX": 1, "cat/.ipynb_checkpoints": 2}
    )
    (path / "cat" / "._0.jpg").write_bytes(b"a resource fork")
    splits = open_splits(path, holdout=2)
    assert splits.class_names == ("cat", "dog")
    assert len(splits.train) + len(splits.val) == 8
    flat = make_folder({".": 3, "__MACOSX": 1}, name="flat")
    (flat / "._0.jpg").write_bytes(b"a resource fork")
    assert len(open_splits(flat, holdout=1).train) == 2


def test_a_split_without_a_class_says_so(make_folder):
    path = make_folder({"train/cat": 2, "train/dog": 2, "train/emu": 2, "val/dog": 1})
    splits = open_splits(path)
    assert splits.description == "folder: 6 images for training, 1 in val/, none of cat, emu"
    assert [label for _, label in splits.val] == [1]
