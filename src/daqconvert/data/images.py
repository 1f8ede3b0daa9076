"""Loaders for training, evaluation and calibration, from the name of the data and a model.

`create_loaders` opens the data (`splits.py`) and sends its images through the transforms that the model expects
(`transforms.py`). Without data it takes scikit-learn's handwritten digits: 1797 real scans of 8 x 8 pixels that come
with the package. Pixels, 0..16, are divided by 16, enlarged bilinearly by a whole factor (4 by default: 32 x 32 is
large enough for the strides of a small timm network), and normalized with `MEAN` and `STD`, which were measured on the
pixels of the default training split.

`answered_by` gives images without labels the class that a model predicts, so that other models can be measured against
this model.

Source of the digits: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (1998), UCI machine learning
repository.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from daqconvert.batches import model_device
from daqconvert.data.input_config import InputConfig, input_config
from daqconvert.data.splits import Splits, open_splits
from daqconvert.data.transforms import IMAGENET, PLAIN, SMALL, Augmentation, image_transform
from daqconvert.errors import DataError
from daqconvert.models import evaluating

Images = Dataset[Any]

# numbers of the digits
SIDE = 8  # pixels of a scan
DIGITS_SIZE = 32  # pixels of an image, unless the user or the model asks for another size
HELD_OUT = 450
MEAN, STD = 0.305, 0.324


@dataclass(frozen=True)
class Loaders:
    """Loaders of `(images, labels)` batches.

    Attributes:
        train: Shuffled (seeded) and augmented training images.
        val: Images kept away from training, in order.
        calibration: Some training images, without augmentation, in one seeded order.
        num_classes: Number of classes; 0 if no image has a label.
        input_size: `(channels, height, width)` of one image.
        class_names: Names of the classes, or None if the data has only numbers.
        description: One line for people.
        labelled: Whether training images have labels; if not, each has -100.
        val_labelled: Whether the images of `val` have labels.
        unused: Fields of `Augmentation` that have no effect on these images.
    """

    train: DataLoader[Any]
    val: DataLoader[Any]
    calibration: DataLoader[Any]
    num_classes: int
    input_size: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    description: str
    labelled: bool = True
    val_labelled: bool = True
    unused: tuple[str, ...] = ()


def create_loaders(
    data: str | Path | Splits | None,
    model: nn.Module,
    batch_size: int = 64,
    *,
    source: str | None = None,
    input_size: int | None = None,
    augment: bool | Augmentation = True,
    calibration_images: int = 256,
    num_workers: int = 0,
    seed: int = 0,
    **options: Any,
) -> Loaders:
    """Return loaders of the data in the form that the model takes.

    The size of the images is `input_size` if it is given; else the model's own if that is fixed; else the data's if
    its images are small (at most 64 pixels a side); else that of the model's configuration.

    Args:
        data: A folder, a parquet file, a timm data set name, opened `Splits`, or None for scikit-learn's digits.
        model: The model; timm's carry their normalization and size.
        batch_size: Number of images in a batch. A last training batch that would be smaller is left out.
        source: Where the model came from, for torchvision's normalization.
        input_size: Height and width of the images.
        augment: Whether training images are cropped and mirrored at random (the digits never are); an `Augmentation`
            says what else they go through.
        calibration_images: Number of training images to calibrate with.
        num_workers: Number of processes that decode images.
        seed: Seed of the order, of the choice of calibration images and of the images that are held out.
        options: Passed on to `open_splits`: `holdout`, `data_root`, `download`, `num_classes`, `val`.

    Raises:
        DataError: If the data cannot be read as asked.

    Example:
        >>> import timm
        >>> model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
        >>> create_loaders(None, model).input_size
        (1, 32, 32)
    """
    config = input_config(model, source) or _guess(model)
    if data is None:
        train, val, plain, info = _digits(config, input_size, seed)
    else:
        splits = data if isinstance(data, Splits) else open_splits(data, seed=seed, **options)
        train, val, plain, info = _images(splits, config, input_size, augment)
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    some = Subset(plain, order[:calibration_images].tolist())
    shared: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
    }
    return Loaders(
        train=DataLoader(
            train,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
            drop_last=len(train) > batch_size,  # type: ignore[arg-type]
            persistent_workers=num_workers > 0,
            **shared,
        ),
        val=DataLoader(val, **shared),
        calibration=DataLoader(some, **shared),
        **info,
    )


def _guess(model: nn.Module) -> InputConfig:
    """Return ImageNet's normalization, for as many channels as the first convolution takes."""
    stems = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    return IMAGENET if next(stems, 3) != 1 else _grey(IMAGENET)


def _grey(config: InputConfig) -> InputConfig:
    """Return the configuration for one channel, with the means over the channels."""
    mean, std = (sum(values) / len(values) for values in (config.mean, config.std))
    return dataclasses.replace(config, input_size=(1, *config.input_size[1:]), mean=(mean,), std=(std,))


def _images(
    splits: Splits, config: InputConfig, side: int | None, augment: bool | Augmentation
) -> tuple[Images, Images, Images, dict[str, Any]]:
    """Return training, validation and calibration images of opened data, and the other fields of `Loaders`."""
    channels, height, width = config.input_size
    if channels not in (1, 3):
        raise DataError(f"The model takes {channels} channels; images can be had with 1 or 3.")
    native = _size_of_first(splits.train)
    small = max(native) <= SMALL
    if side is not None:
        height = width = side
    elif small and not config.fixed_size:
        height = width = max(native)
    config = dataclasses.replace(config, input_size=(channels, height, width))
    plain = image_transform(config, train=False, small=small)
    noisy = plain
    if augment:
        more = augment if isinstance(augment, Augmentation) else PLAIN
        noisy = image_transform(config, train=True, small=small, flip=splits.flip, more=more)
    info = {
        "num_classes": splits.num_classes,
        "input_size": (channels, height, width),
        "class_names": splits.class_names,
        "description": f"{splits.description}, at {width} x {height}",
        "labelled": splits.labelled,
        "val_labelled": splits.val_labelled,
        "unused": ("crop_scale",) if small else (),
    }
    return Transformed(splits.train, noisy), Transformed(splits.val, plain), Transformed(splits.train, plain), info


def _size_of_first(images: Images) -> tuple[int, int]:
    """Return the size of the first image that can be read; the others are told of by who reads or checks them."""
    for index in range(len(images)):  # type: ignore[arg-type]
        with suppress(DataError):
            width, height = images[index][0].size
            return width, height
    width, height = images[0][0].size
    return width, height


class Transformed(Dataset[tuple[Any, int]]):
    """A data set of `(image, label)` whose images go through a transform to tensors."""

    def __init__(self, images: Dataset[Any], transform: Callable[[Any], Any]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


def _digits(config: InputConfig, side: int | None, seed: int) -> tuple[Images, Images, Images, dict[str, Any]]:
    """Return what `_images` returns, for the digits."""
    channels, height, _ = config.input_size
    side = side or (height if config.fixed_size else DIGITS_SIZE)
    found = load_digits(side, channels, seed=seed)
    train = TensorDataset(found.train_images, found.train_labels)
    val = TensorDataset(found.val_images, found.val_labels)
    text = f"scikit-learn's digits at {side} x {side}: {len(train)} images for training, {len(val)} held out"
    names = tuple(map(str, range(10)))
    info = {
        "num_classes": 10, "input_size": (channels, side, side), "class_names": names, "description": text,
        "unused": tuple(field.name for field in dataclasses.fields(Augmentation)),
    }  # fmt: skip
    return train, val, train, info


@dataclass(frozen=True)
class Digits:
    """The two splits: images `(N, channels, size, size)` float32, labels `(N,)` int64, and row numbers."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    train_rows: tuple[int, ...]
    val_rows: tuple[int, ...]


def load_digits(size: int = 32, channels: int = 1, held_out: int = HELD_OUT, seed: int = 0) -> Digits:
    """Return the digits, split by a seeded choice that keeps the share of every class.

    The side of the images, `size`, is a multiple of 8. For a network that takes colour, `channels` is the number of
    equal copies.

    Raises:
        DataError: If scikit-learn is missing or the size is no multiple of 8.

    Example:
        >>> load_digits().train_images.shape
        torch.Size([1347, 1, 32, 32])
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("The digits need scikit-learn. Run pip install 'daqconvert[demo]'.") from error
    if size < SIDE or size % SIDE:
        raise DataError(f"Digits can be had in multiples of {SIDE} pixels, not {size}.")
    found = datasets.load_digits()
    labels = torch.from_numpy(found.target).long()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    images = F.interpolate(images, scale_factor=size // SIDE, mode="bilinear", align_corners=False)
    images = images.sub(MEAN).div(STD).repeat(1, channels, 1, 1)
    rows = list(range(len(labels)))
    train, val = train_test_split(rows, test_size=held_out, stratify=found.target, random_state=seed)
    return Digits(images[train], labels[train], images[val], labels[val], tuple(train), tuple(val))


def answered_by(model: nn.Module, loaders: Loaders) -> Loaders:
    """Return loaders whose `val` has a model's predictions as labels; if it has labels already, the same loaders.

    Args:
        model: Model that returns logits `(N, C)`.
        loaders: Loaders from `create_loaders`.

    Example:
        >>> from daqconvert.data import create_loaders
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        >>> digits = dataclasses.replace(create_loaders(None, model, batch_size=450), val_labelled=False)
        >>> images, answers = next(iter(answered_by(model, digits).val))
        >>> bool((model(images).argmax(1) == answers).all())
        True
    """
    if loaders.val_labelled:
        return loaders
    device, val = model_device(model), loaders.val
    with evaluating(model), torch.no_grad():
        answers = torch.cat([model(images.to(device)).argmax(dim=1).cpu() for images, _ in val])
    answered = DataLoader(
        Answered(val.dataset, answers), val.batch_size, num_workers=val.num_workers, pin_memory=val.pin_memory
    )
    text = f"{loaders.description}; labels to measure by: the float model's answers"
    return dataclasses.replace(loaders, val=answered, description=text)


class Answered(Dataset[tuple[Any, int]]):
    """The images of a data set, with a model's predicted classes, `(N,)` int64, as labels."""

    def __init__(self, images: Dataset[Any], answers: Tensor) -> None:
        self.images = images
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], int(self.answers[index])
