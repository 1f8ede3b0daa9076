from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from daqconvert.data import create_loaders, input_config, open_splits
from daqconvert.errors import DataError
from daqconvert.sources import build_model
from helpers.images import TWO_SPLITS, jpeg


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


def test_normalization_is_the_models(make_folder, model):
    loaders = create_loaders(make_folder(TWO_SPLITS), model)
    config = input_config(model)
    pixels = open_splits(loaders_root(loaders)).val[0][0]
    expected = torch.tensor(list(pixels.convert("RGB").tobytes())).reshape(32, 32, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    assert torch.allclose(loaders.val.dataset[0][0], (expected - mean) / std, atol=1e-5)


def loaders_root(loaders):
    return loaders.val.dataset.images.root.removesuffix("/val")


def test_undecodable_image_names_the_file(make_folder, model):
    root = make_folder(TWO_SPLITS)
    (root / "val" / "dog" / "1.jpg").write_bytes(jpeg(0)[:100])
    loaders = create_loaders(root, model)
    with pytest.raises(DataError, match=r"dog.1\.jpg is no readable image"):
        list(loaders.val)


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
