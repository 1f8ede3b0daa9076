"""Images in folders, one for each class, which lie in `train/` and `val/` or are split by a seeded choice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from daqconvert.data.decoding import Encoded, decoded
from daqconvert.errors import DataError, few_names, nearest

VAL_NAMES = ("val", "validation", "valid", "test")
HOLDOUT = 0.1
LEFTOVERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
NO_LABEL = -100  # the label of images that cross entropy and top-1 leave out


def open_folder(
    path: Path, holdout: float | int | None, seed: int, known: bool = False
) -> tuple[Dataset[Any], Dataset[Any], int, tuple[str, ...], str]:
    """Return training and validation images of a folder, number and names of its classes, and one line about them.

    The folder holds `train/` and `val/`, or a folder for each class; then `holdout` says how many images are held out.
    The classes of `val/` are among those of `train/`; where a model's classes are `known` anyway, they need not be.

    Raises:
        DataError: If a split is missing, a class is empty or there are no images.
    """
    train_path = path / "train"
    val_path = next((path / name for name in VAL_NAMES if (path / name).is_dir()), None)
    if train_path.is_dir() or val_path is not None:
        if not train_path.is_dir() or val_path is None:
            have = "train/" if train_path.is_dir() else f"{val_path.name}/" if val_path is not None else ""
            raise DataError(f"{path}: it has {have}, expected both train/ and val/ (or validation/), or neither.")
        if holdout is not None:
            raise DataError(f"{path}: it has its own {val_path.name}/, so nothing is held out. Leave holdout out.")
        classes = _classes(train_path)
        if known:
            classes = tuple(sorted({*classes, *_classes(val_path)}))
        train, val = _folder(train_path, classes), _folder(val_path, classes)
        text = f"{path.absolute().name}: {len(train)} images for training, {len(val)} in {val_path.name}/"
        text += _without([classes[number] for number in sorted({*range(len(classes))} - {*val.targets})])
        return train, val, len(classes), classes, text
    classes = _classes(path)
    images = _folder(path, classes)
    rest, held = stratified(images.targets, holdout, seed, str(path))
    text = f"{path.absolute().name}: {len(rest)} images for training, {len(held)} held out"
    return Subset(images, rest), Subset(images, held), len(classes), classes, text


def _without(missing: list[str]) -> str:
    """Return what to say of a split without images of some classes."""
    return f", none of {few_names(missing)}" if missing else ""


def open_classes(path: Path) -> Folder:
    """Return all images of a folder of class folders.

    Raises:
        DataError: If a class is empty or there are no images.
    """
    return _folder(path, _classes(path))


def is_flat(path: Path) -> bool:
    """Return whether a folder holds images and no folder.

    Raises:
        DataError: If it holds both.
    """
    entries = list(path.iterdir())
    folders = sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))
    images = sorted(entry.name for entry in entries if _is_image(entry))
    if folders and images:
        raise DataError(
            f"{path}: it holds images, such as {images[0]}, and folders, such as {folders[0]}. Expected a folder of "
            "images for each class, or images alone, without labels."
        )
    return bool(images)


class Unlabelled(Dataset[Any]):
    """The images of one folder, in the order of their names, each with the label `NO_LABEL`."""

    def __init__(self, path: Path) -> None:
        self.paths = sorted(str(entry) for entry in path.iterdir() if _is_image(entry))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return decoded(self.encoded(index)), NO_LABEL

    def encoded(self, index: int) -> Encoded:
        """Return an image as it is stored."""
        return Encoded(self.paths[index], self.paths[index])


def _is_image(path: Path) -> bool:
    """Whether a path has the name of an image; a link that leads nowhere has it too, so that it can be told of."""
    return path.suffix.lower() in IMG_EXTENSIONS and not is_hidden(path.name) and not path.is_dir()


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the user's data: hidden, or left by a system or a notebook.

    Example:
        >>> [is_hidden(name) for name in (".git", ".ipynb_checkpoints", "__MACOSX", "._cat.jpg", "cat")]
        [True, True, True, True, False]
    """
    return name.startswith(".") or name in LEFTOVERS


def _classes(path: Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name)))
    if not classes:
        raise DataError(f"{path}: expected a folder of images for each class, found no folder in it.")
    return classes


class Folder(ImageFolder):
    """A folder of class folders, numbered by the order of `classes`; some classes may have no folder."""

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self._names = list(classes)
        super().__init__(str(path), loader=load_image, is_valid_file=self._is_valid, allow_empty=True)

    def _is_valid(self, path: str) -> bool:
        parts = Path(path).relative_to(self.root).parts
        return Path(path).suffix.lower() in IMG_EXTENSIONS and not any(map(is_hidden, parts))

    def encoded(self, index: int) -> Encoded:
        """Return an image as it is stored."""
        return Encoded(self.samples[index][0], self.samples[index][0])

    def others(self) -> Counter[str]:
        """Return how many files in the class folders have not the name of an image, for people, by their suffix."""
        found: Counter[str] = Counter()
        for name in self._names:
            for path in (Path(self.root) / name).rglob("*"):
                hidden = any(map(is_hidden, path.relative_to(self.root).parts))
                if not hidden and not path.is_dir() and path.suffix.lower() not in IMG_EXTENSIONS:
                    found[f"more files are left out, as {path.suffix or path.name} is no image's suffix here"] += 1
        return found

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class names and their numbers: those of the training split, even if this split lacks a class."""
        return self._names, {name: number for number, name in enumerate(self._names)}


def _folder(path: Path, classes: Sequence[str]) -> Folder:
    """Open a folder of class folders; a class that is not among `classes`, or has no image, is a `DataError`."""
    strange = [name for name in _classes(path) if name not in classes]
    if strange:
        raise DataError(f"{path}: class {strange[0]!r} is not among those trained on.{nearest(strange[0], classes)}")

    images = Folder(path, classes)
    if not images.samples:
        raise DataError(f"{path}: no images in it. Expected files ending in {', '.join(IMG_EXTENSIONS)}.")
    for number in sorted({classes.index(name) for name in _classes(path)} - set(images.targets)):
        raise DataError(f"{path}: no images of class {classes[number]!r}. Add some, or remove the folder.")
    return images


def load_image(path: str) -> Any:
    """Return the decoded image in a file, with 8 bits a channel and the right way up.

    Raises:
        DataError: If it is no readable image.
    """
    return decoded(Encoded(path, path))


def stratified(labels: list[int], holdout: float | int | None, seed: int, where: str) -> tuple[list[int], list[int]]:
    """Return sorted positions of the images that remain and of those held out; every class has its share in both.

    Raises:
        DataError: If one side would be empty; the message calls the data `where`.
    """
    count = holdout_count(holdout, len(labels), where)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: dict[int, int] = {}
    sizes = Counter(labels)
    keys = []
    for position in order:  # the k-th image of a class of n comes at (k + 1/2) / n: an even mixture of classes
        label = labels[position]
        keys.append(((seen.get(label, 0) + 0.5) / sizes[label], position))
        seen[label] = seen.get(label, 0) + 1
    mixed = [position for _, position in sorted(keys)]
    return sorted(mixed[count:]), sorted(mixed[:count])


def holdout_count(holdout: float | int | None, rows: int, where: str) -> int:
    """Return how many of `rows` images to hold out, from a share (below 1), a number, or None for a tenth.

    Raises:
        DataError: If one side would be empty; the message calls the data `where`.

    Example:
        >>> holdout_count(0.25, 10, "data"), holdout_count(3, 10, "data")
        (3, 3)
    """
    holdout = HOLDOUT if holdout is None else holdout
    count = math.ceil(holdout * rows) if 0 < holdout < 1 else holdout
    if not 0 < count < rows or count % 1:
        raise DataError(
            f"{where}: cannot hold out {holdout!r} of {rows} images. Give a share between 0 and 1, or a number of "
            f"images from 1 to {rows - 1}."
        )
    return int(count)
