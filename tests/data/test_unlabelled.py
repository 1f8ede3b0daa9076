"""Images without labels, and an evaluation set of their own."""

from __future__ import annotations

import pytest
import timm
import torch

from daqconvert.data import answered_by, create_loaders, open_splits
from daqconvert.errors import DataError
from helpers.images import jpeg


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for index in range(10):
        (root / f"{index}.jpg").write_bytes(jpeg(index))
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_resnet", num_classes=7)


def test_flat_folder_is_split(flat):
    splits = open_splits(flat, holdout=0.3)
    assert (len(splits.train), len(splits.val), splits.num_classes, splits.class_names) == (7, 3, 0, None)
    assert (splits.labelled, splits.val_labelled) == (False, False)
    assert set(splits.train.indices) | set(splits.val.indices) == set(range(10))
    assert {label for _, label in splits.train} == {-100}
    assert splits.description == "photos: 7 images without labels for training, 3 held out"
    assert splits.val.indices == open_splits(flat, holdout=3).val.indices
    assert splits.val.indices != open_splits(flat, holdout=3, seed=1).val.indices


def test_all_of_it_beside_labelled_validation_images(flat, make_folder):
    val = make_folder({"cat": 2, "dog": 3}, name="val")
    splits = open_splits(flat, val=val)
    assert (len(splits.train), len(splits.val), splits.num_classes) == (10, 5, 2)
    assert (splits.labelled, splits.val_labelled, splits.class_names) == (False, True, ("cat", "dog"))
    assert [label for _, label in splits.val] == [0, 0, 1, 1, 1]
    assert splits.description == "photos: 10 images without labels for training, 5 in val"


def test_val_is_numbered_as_the_training_classes(make_folder):
    splits = open_splits(make_folder({"a": 1, "b": 1, "c": 1}), val=make_folder({"c": 2}, name="val"))
    assert ([label for _, label in splits.val], splits.num_classes, splits.labelled) == ([2, 2], 3, True)


def test_parquet_for_both(make_parquet):
    one = make_parquet([jpeg(0), jpeg(1)], [0, 1], name="one")
    two = make_parquet([jpeg(2)], [4], name="two")
    splits = open_splits(one, val=two)
    assert (len(splits.train), len(splits.val), splits.num_classes) == (2, 1, 5)


def test_answers_of_a_model_are_the_labels(flat, model):
    loaders = create_loaders(flat, model, 4, holdout=5)
    assert {int(label) for _, labels in loaders.val for label in labels} == {-100}
    answered = answered_by(model, loaders)
    images, labels = next(iter(answered.val))
    model.eval()
    assert torch.equal(labels, model(images).argmax(1))
    assert answered.description.endswith("; labels to measure by: the float model's answers")
    assert answered.train is loaders.train


def test_labels_that_are_there_stay(make_folder, model):
    loaders = create_loaders(make_folder({"cat": 4, "dog": 4}), model)
    assert answered_by(model, loaders) is loaders


def test_images_beside_folders_are_refused(flat):
    (flat / "album").mkdir()
    with pytest.raises(DataError, match=r"photos: it holds images, such as 0.jpg, and folders, such as album"):
        open_splits(flat)


def test_mistakes_beside_val(flat, make_folder, tmp_path):
    with pytest.raises(DataError, match=r"nothing of .*photos is held out"):
        open_splits(flat, holdout=0.1, val=flat)
    with pytest.raises(DataError, match=r"gone: there is no such folder or file. Beside --val, expected"):
        open_splits(flat, val=tmp_path / "gone")
    with pytest.raises(DataError, match=r"it has train/. Name the folder whose images are meant"):
        open_splits(make_folder({"train/a": 1, "val/a": 1}), val=flat)
