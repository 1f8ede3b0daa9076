"""What training images go through, as a recipe says it."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from PIL import Image

from daqconvert.data import Augmentation, create_loaders
from daqconvert.data.transforms import IMAGENET, image_transform
from daqconvert.errors import DataError

LARGE, SMALL = False, True


def steps(more, small, flip=True):
    transform = image_transform(IMAGENET, train=True, small=small, flip=flip, more=more)
    return [type(step).__name__ for step in transform.transforms[1:]]


def test_published_recipe_on_large_images_is_crop_and_flip():
    """RandomResizedCrop(224) from 8 % of the image on, and a flip: nothing else before normalization."""
    found = image_transform(IMAGENET, train=True, small=LARGE).transforms[1:]
    assert [type(step).__name__ for step in found] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"
    ]  # fmt: skip
    assert (found[0].size, found[0].scale, found[1].p) == ((224, 224), (0.08, 1.0), 0.5)
    assert [round(float(value), 3) for value in (*found[3].mean, *found[3].std)] == [
        0.485, 0.456, 0.406, 0.229, 0.224, 0.225
    ]  # fmt: skip


def test_published_recipe_on_small_images_is_padded_crop_and_flip():
    assert steps(Augmentation(), SMALL) == [
        "Resize",
        "RandomCrop",
        "RandomHorizontalFlip",
        "MaybeToTensor",
        "Normalize",
    ]
    assert "RandomHorizontalFlip" not in steps(Augmentation(), SMALL, flip=False)


@pytest.mark.parametrize("small", [LARGE, SMALL], ids=["large", "small"])
def test_each_option_adds_its_step(small):
    more = Augmentation("rand-m9-mstd0.5", color_jitter=0.4, random_erasing=0.25)
    assert steps(more, small)[2 + small :] == [
        "RandAugment",
        "ColorJitter",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert "ColorJitter" in steps(Augmentation(color_jitter=0.1), small)
    assert steps(Augmentation(random_erasing=0.1), small)[-1] == "RandomErasing"
    found = image_transform(IMAGENET, train=True, small=small, more=more).transforms
    assert (found[4 + small].brightness, found[-1].probability) == ((0.6, 1.4), 0.25)


def test_crop_scale():
    found = image_transform(IMAGENET, train=True, small=LARGE, more=Augmentation(crop_scale=0.5))
    assert found.transforms[1].scale == (0.5, 1.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("word", ["rand-m9-mstd0.5", "augmix-m3-w3", "original"])
def test_tensors_have_their_shape(word, channels):
    config = dataclasses.replace(
        IMAGENET, input_size=(channels, 40, 40), mean=(0.5,) * channels, std=(0.2,) * channels
    )
    more = Augmentation(word, 0.4, 1.0)
    for small in (LARGE, SMALL):
        transform = image_transform(config, train=True, small=small, more=more)
        found = transform(Image.new("RGB", (60, 50), (200, 10, 90)))
        assert (found.shape, found.dtype) == ((channels, 40, 40), torch.float32)


@pytest.mark.parametrize("word", ["strong", "rand-m9-zz3"])
def test_words_that_timm_does_not_know(word):
    with pytest.raises(DataError, match=rf"augment: timm does not know '{word}' .*Expected a word such as rand-m9"):
        image_transform(IMAGENET, train=True, small=LARGE, more=Augmentation(word))


def test_loaders_take_it_and_say_what_says_nothing(make_folder):
    counts = {"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1}
    model = timm.create_model("test_resnet", num_classes=2)
    more = Augmentation(color_jitter=0.3)
    small = create_loaders(make_folder(counts), model, augment=more)
    large = create_loaders(make_folder(counts, (100, 80), "large"), model, augment=more)
    for loaders in (small, large):
        assert "ColorJitter" in str(loaders.train.dataset.transform)
        assert "ColorJitter" not in str(loaders.val.dataset.transform)
    assert (small.unused, large.unused) == (("crop_scale",), ())
    digits = create_loaders(None, timm.create_model("test_resnet", in_chans=1), augment=more)
    assert digits.unused == ("augment", "color_jitter", "random_erasing", "crop_scale")
