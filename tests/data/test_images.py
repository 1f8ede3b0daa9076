from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from daqconvert.data import create_loaders, input_config, open_splits
from daqconvert.data.folders import holdout_count
from daqconvert.errors import DataError
from daqconvert.sources import build_model
from helpers.images import jpeg

TWO_SPLITS = {"train/cat": 5, "train/dog": 4, "val/cat": 2, "val/dog": 3}


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_resnet", num_classes=2)


def test_train_and_val_folders(make_folder, model):
    loaders = create_loaders(make_folder(TWO_SPLITS), model, batch_size=4)
    assert (loaders.num_classes, loaders.class_names, loaders.input_size) == (2, ("cat", "dog"), (3, 32, 32))
    images, labels = next(iter(loaders.val))
    assert images.shape == (4, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1]
    assert (len(loaders.train), len(loaders.val), len(loaders.calibration.dataset)) == (2, 2, 9)
    assert model(images).shape == (4, 2)


@pytest.mark.parametrize("counts", [TWO_SPLITS, {"cat": 20, "dog": 10}], ids=["two splits", "one"])
def test_the_folder_one_stands_in_has_a_name(make_folder, monkeypatch, counts):
    monkeypatch.chdir(make_folder(counts))
    assert open_splits(".").description.startswith("folder: ")


def test_normalization_is_the_models(make_folder, model):
    loaders = create_loaders(make_folder(TWO_SPLITS), model)
    config = input_config(model)
    pixels = open_splits(loaders_root(loaders)).val[0][0]
    expected = torch.tensor(list(pixels.convert("RGB").tobytes())).reshape(32, 32, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    assert torch.allclose(loaders.val.dataset[0][0], (expected - mean) / std, atol=1e-5)


def loaders_root(loaders):
    return loaders.val.dataset.images.root.removesuffix("/val")


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


def test_undecodable_image_names_the_file(make_folder, model):
    root = make_folder(TWO_SPLITS)
    (root / "val" / "dog" / "1.jpg").write_bytes(jpeg(0)[:100])
    loaders = create_loaders(root, model)
    with pytest.raises(DataError, match=r"dog.1\.jpg is no readable image"):
        list(loaders.val)


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


def test_timm_data_set(tmp_path, model):
    write_mnist(tmp_path)
    loaders = create_loaders("torch/mnist", model, batch_size=4, data_root=tmp_path)
    assert (loaders.num_classes, len(loaders.train.dataset), len(loaders.val.dataset)) == (10, 12, 12)
    images, labels = next(iter(loaders.val))
    assert images.shape == (4, 3, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    assert "Flip" not in str(loaders.train.dataset.transform)


def write_mnist(root):
    """Twelve images in the idx format of MNIST, as torchvision reads it."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (12, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(range(12)) * 784)
        labels = bytes(index % 10 for index in range(12))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (12).to_bytes(4, "big") + labels)


def test_parquet_holds_out_the_last_rows(make_parquet, model):
    path = make_parquet([jpeg(seed) for seed in range(6)], [0, 1, 0, 1, 1, 0], "cat,dog")
    loaders = create_loaders(path, model, holdout=2)
    assert [label for _, label in loaders.val.dataset] == [1, 0]
    assert (loaders.num_classes, loaders.class_names, len(loaders.train.dataset)) == (2, ("cat", "dog"), 4)
    with pytest.raises(DataError, match="2 classes, more than the 1"):
        create_loaders(path, model, num_classes=1)


def test_large_images_go_through_timms_transforms(make_folder):
    root = make_folder(TWO_SPLITS, size=(300, 240))
    loaders = create_loaders(root, timm.create_model("test_resnet", num_classes=2), batch_size=2)
    assert loaders.input_size == (3, 160, 160)
    assert next(iter(loaders.train))[0].shape == (2, 3, 160, 160)
    again = create_loaders(root, timm.create_model("test_resnet", num_classes=2), input_size=96)
    assert next(iter(again.val))[0].shape[1:] == (3, 96, 96)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("test_vit", {}, (3, 160, 160)),
        ("test_vit", {"img_size": 64, "in_chans": 1}, (1, 64, 64)),
        ("test_resnet", {"in_chans": 1}, (1, 32, 32)),
    ],
    ids=["fixed", "built for another", "one channel"],
)
def test_size_and_channels_are_those_the_model_takes(make_folder, name, arguments, size):
    model = timm.create_model(name, num_classes=2, **arguments)
    loaders = create_loaders(make_folder(TWO_SPLITS), model, batch_size=2)
    assert loaders.input_size == size
    assert model(next(iter(loaders.train))[0]).shape == (2, 2)


def test_five_channels_are_refused(make_folder):
    with pytest.raises(DataError, match="takes 5 channels"):
        create_loaders(make_folder(TWO_SPLITS), timm.create_model("test_resnet", in_chans=5))


def test_digits_for_a_model_nobody_knows():
    loaders = create_loaders(None, nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), batch_size=100)
    assert loaders.input_size == (1, 32, 32)
    images, labels = next(iter(loaders.train))
    assert (images.shape, labels.dtype) == ((100, 1, 32, 32), torch.int64)
    assert (len(loaders.train), len(loaders.val)) == (13, 5)


def test_order_and_calibration_are_seeded():
    model = timm.create_model("test_resnet", in_chans=1)
    first, again, other = (create_loaders(None, model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(next(iter(first.train))[1], next(iter(again.train))[1])
    assert torch.equal(next(iter(first.calibration))[0], next(iter(again.calibration))[0])
    assert not torch.equal(next(iter(first.calibration))[0], next(iter(other.calibration))[0])
    assert len(first.calibration.dataset) == 256


def test_calibration_images_are_training_images_without_augmentation(make_folder, model):
    loaders = create_loaders(make_folder(TWO_SPLITS), model, calibration_images=3)
    assert len(loaders.calibration.dataset) == 3
    once, twice = (next(iter(loaders.calibration))[0] for _ in range(2))
    assert torch.equal(once, twice)
    assert not torch.equal(loaders.train.dataset[0][0], loaders.train.dataset[0][0])
    plain = create_loaders(make_folder(TWO_SPLITS, name="other"), model, augment=False)
    assert torch.equal(plain.train.dataset[0][0], plain.train.dataset[0][0])


def test_torchvision_normalization():
    model = build_model("torchvision:resnet18", num_classes=3)
    config = input_config(model, "torchvision:resnet18")
    assert (config.input_size, config.mean[0], config.interpolation) == ((3, 224, 224), 0.485, "bilinear")
    assert input_config(model) is None
    assert input_config(build_model("torchvision:fcn_resnet50"), "torchvision:fcn_resnet50") is None
