"""Training and validation images of a data set, before any transform: `(PIL image, label)` pairs.

Data is named by a string: a folder, a parquet file, or a timm data set name such as `torch/cifar10`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from daqconvert.data.folders import NO_LABEL, Unlabelled, holdout_count, is_flat, open_classes, open_folder, stratified
from daqconvert.data.parquet import ParquetImages, count_rows
from daqconvert.errors import DataError, nearest

TORCH_NAMES = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365", "inat")
TIMM_PREFIXES = ("torch", "hfds")
ITERABLE_PREFIXES = ("tfds", "wds", "hfids")
DATA_ROOT = "data"  # where a timm data set lies, unless the user says it
OFTEN = 10  # rows a class: in so many mixed rows a class is missing once in twenty thousand times
NO_FLIP = ("mnist", "kmnist", "qmnist", "svhn", "digits")


@dataclass(frozen=True)
class Splits:
    """Two data sets of `(PIL image, label)`.

    Attributes:
        train: Images that a model is trained on.
        val: Images that it is evaluated on.
        num_classes: Number of classes; 0 if no image has a label.
        class_names: Names of the classes, or None if the data has only numbers.
        description: One line for people.
        flip: Whether a mirrored image is still of its class.
        labelled: Whether the images of `train` have labels; if not, each has -100.
        val_labelled: Whether the images of `val` have labels.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    description: str
    flip: bool = True
    labelled: bool = True
    val_labelled: bool = True


def open_splits(
    data: str | Path,
    holdout: float | int | None = None,
    seed: int = 0,
    data_root: str | Path | None = None,
    download: bool = False,
    num_classes: int | None = None,
    val: str | Path | None = None,
    known: bool = False,
) -> Splits:
    """Open a folder, a parquet file or a timm data set.

    Args:
        data: A folder with `train/` and `val/` (or `validation/`), each with a folder of images per class; a folder
            that directly holds such class folders; a folder of images alone, without labels; a `.parquet` file; or a
            name such as `torch/NAME` or `hfds/NAME`.
        holdout: Share (below 1) or number of the images of one folder or parquet file that are kept for evaluation;
            None for a tenth. Of a parquet file these are the last rows; of a folder, and of a parquet file whose rows
            lie by class, a seeded choice from every class.
        seed: Seed of that choice.
        data_root: Folder that holds a timm data set; `data` in the current one by default.
        download: Whether a timm data set may be downloaded.
        num_classes: Number of classes, if the data does not say it.
        val: Other data to evaluate on, all of it: a folder of class folders or of images alone, or a parquet file.
            In that case all of `data` is trained on.
        known: Whether a model's classes are known, to which `renumbered` maps these: `val` may then have classes that
            `data` does not have.

    Raises:
        DataError: If there is no such data, a split is missing, or a class is empty.
    """
    path = Path(data)
    if val is not None:
        splits = _open_two(path, Path(val), holdout, known)
    elif path.is_dir():
        splits = _open_flat(path, holdout, seed) if is_flat(path) else Splits(*open_folder(path, holdout, seed, known))
    elif path.is_file() and path.suffix == ".parquet":
        splits = _open_parquet(path, holdout, seed)
    elif not path.exists() and str(data).partition("/")[0].lower() in TIMM_PREFIXES + ITERABLE_PREFIXES:
        splits = _open_timm(str(data), Path(data_root or DATA_ROOT), download, num_classes)
    else:
        found = "it is a file of another kind" if path.exists() else "there is no such folder or file"
        raise DataError(
            f"Data {str(data)!r}: {found}. Expected a folder of images, a .parquet file, or a data set name such as "
            f"torch/cifar10.{nearest(str(data), [f'torch/{name}' for name in TORCH_NAMES])}"
        )
    if num_classes is not None and num_classes < splits.num_classes:
        raise DataError(f"{data}: it has {splits.num_classes} classes, more than the {num_classes} asked for.")
    return splits


def _open_flat(path: Path, holdout: float | int | None, seed: int) -> Splits:
    images = Unlabelled(path)
    rest, held = stratified([NO_LABEL] * len(images), holdout, seed, str(path))
    text = f"{path.absolute().name}: {len(rest)} images without labels for training, {len(held)} held out"
    return Splits(Subset(images, rest), Subset(images, held), 0, None, text, labelled=False, val_labelled=False)


def _open_two(data: Path, val: Path, holdout: float | int | None, known: bool) -> Splits:
    """Open all images of `data` for training, and all of `val` for evaluation, with classes mapped by name."""
    if holdout is not None:
        raise DataError(f"{val}: is what is evaluated on, so nothing of {data} is held out. Leave holdout out.")
    train, classes, names = _whole(data)
    held, val_classes, val_names = _whole(val)
    labelled, val_labelled = classes is not None, val_classes is not None
    without = ("" if labelled else " without labels", "" if val_labelled else " without labels")
    places = data.absolute().name, val.absolute().name
    text = f"{places[0]}: {len(train)} images{without[0]} for training, {len(held)}{without[1]} in {places[1]}"
    flip = data.stem not in NO_FLIP
    if labelled and val_names is not None and val_names != names:
        order, names, more = _order(val, val_names, names, classes or 0, known)
        held, val_classes, text = Renumbered(held, order), max(order) + 1, text + more
    most = max(classes or 0, val_classes or 0, len(names or ()))
    return Splits(train, held, most, names or val_names, text, flip, labelled, val_labelled)


def _order(
    val: Path, own: tuple[str, ...], names: tuple[str, ...] | None, count: int, known: bool
) -> tuple[list[int], tuple[str, ...] | None, str]:
    """Return the number in training of each class of `val`, all names, and what to say of classes without names."""
    if names is not None:
        names += tuple(name for name in own if known and name not in names)
        for name in own:
            if name not in names:
                raise DataError(f"{val}: class {name!r} is not among those trained on.{nearest(name, names)}")
        return [names.index(name) for name in own], names, ""
    if all(name.isascii() and name.isdecimal() and int(name) < count for name in own):
        return [int(name) for name in own], None, ""  # the folders are named by what the training labels are
    if len(own) != count:
        raise DataError(
            f"{val}: it has {len(own)} classes with names, such as {own[0]!r}, but training labels are numbers from 0 "
            f"to {count - 1}, and nothing says which is which. Name its folders by these numbers."
        )
    return list(range(count)), own, f"; {val.absolute().name} is numbered in the order of its classes"


class Renumbered(Dataset[Any]):
    """A data set of `(image, label)` whose label `k` becomes `numbers[k]`; images without a label keep none."""

    def __init__(self, images: Any, numbers: Sequence[int]) -> None:
        self.images = images
        self.numbers = list(numbers)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return image, NO_LABEL if int(label) == NO_LABEL else self.numbers[int(label)]


def _whole(path: Path) -> tuple[Any, int | None, tuple[str, ...] | None]:
    """Return all images of a folder or parquet file, the number of classes (None without labels) and their names."""
    if path.is_file() and path.suffix == ".parquet":
        rows = ParquetImages(path)
        return rows, rows.num_classes, rows.class_names
    if not path.is_dir():
        found = "is a file of another kind" if path.exists() else "there is no such folder or file"
        raise DataError(f"{path}: {found}. Beside --val, expected a folder of images or a .parquet file for both.")
    if is_flat(path):
        return Unlabelled(path), None, None
    if (path / "train").is_dir():
        raise DataError(f"{path}: it has train/. Name the folder whose images are meant, as {path / 'train'}.")
    images = open_classes(path)
    return images, len(images.classes), tuple(images.classes)


def _open_parquet(path: Path, holdout: float | int | None, seed: int) -> Splits:
    rows = count_rows(path)
    at = rows - holdout_count(holdout, rows, str(path))
    flip = path.stem not in NO_FLIP
    whole = ParquetImages(path)
    if _by_class(whole.labels, at):
        rest, held = stratified(whole.labels.tolist(), holdout, seed, str(path))
        text = f"{path.name}: rows lie by class, so of every class some are held out: {len(held)} of {rows}"
        parts: tuple[Dataset[Any], Dataset[Any]] = Subset(whole, rest), Subset(whole, held)
    else:
        text = f"{path.name}: rows 0 to {at - 1} for training, {at} to {rows - 1} held out"
        parts = whole.part(0, at), whole.part(at, rows)
    return Splits(*parts, whole.num_classes, whole.class_names, text, flip=flip)


def _by_class(labels: Tensor, at: int) -> bool:
    """Whether rows of one class lie together, or one side of row `at` lacks a class that it would have by chance."""
    classes = len(labels.unique())
    changes = int((labels[1:] != labels[:-1]).sum())
    together = classes > 1 and changes == classes - 1 and len(labels) > classes
    held = len(labels) - at
    lacking = len(labels[:at].unique()) < classes or (held > OFTEN * classes and len(labels[at:].unique()) < classes)
    return together or lacking


def _open_timm(name: str, root: Path, download: bool, num_classes: int | None) -> Splits:
    prefix, _, rest = name.partition("/")
    if prefix.lower() in ITERABLE_PREFIXES:
        raise DataError(f"{name}: streamed data sets cannot be shuffled and resumed. Use one of torch/..., hfds/....")
    if prefix.lower() == "torch" and rest.lower() not in TORCH_NAMES:
        raise DataError(f"{name}: no such data set.{nearest(rest, TORCH_NAMES)}")
    train, val = (_timm_split(name, root, split, download) for split in ("train", "validation"))
    names = getattr(train, "classes", None)
    classes = len(names) if names else num_classes
    if classes is None:
        raise DataError(f"{name}: it does not say how many classes it has. Give the number of classes.")
    text = f"{name}: {len(train)} images for training, {len(val)} for validation"
    flip = rest.lower() not in NO_FLIP
    return Splits(train, val, classes, tuple(map(str, names)) if names else None, text, flip)


def _timm_split(name: str, root: Path, split: str, download: bool) -> Any:
    from timm.data import create_dataset

    make: Callable[..., Any] = create_dataset
    try:
        found = make(name, root=str(root), split=split, is_training=split == "train", download=download)
    except Exception as error:  # each library behind timm raises its own types
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "" if download else " Give the folder that holds it, or allow the download."
        raise DataError(f"{name}: its {split} split could not be read from {root} ({what}).{hint}") from error
    if isinstance(found, IterableDataset):
        raise DataError(f"{name}: streamed data sets cannot be shuffled and resumed.")
    return found
