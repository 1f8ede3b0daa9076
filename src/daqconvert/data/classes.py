"""Which number a class has: data counts its classes in its own order, a model has an output for each that it knows.

A model's classes are known from the run or artifact that it comes from, from what timm or torchvision publish with its
weights, or from a file that the user gives. `renumbered` maps the labels of data to them by name. A name is compared
in Unicode's composed form (NFC), because file systems keep accents in two forms.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from daqconvert.data.splits import Renumbered, Splits
from daqconvert.errors import DataError, few_names, nearest
from daqconvert.sources import Source, parse_source

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Classes:
    """The classes of a model.

    Attributes:
        count: Number of the model's outputs.
        names: Names by number, or None if nobody kept them; there may be fewer than outputs.
        others: Further names, such as those of ImageNet's synsets, and the number that each stands for.
        numbers: Whether the model was trained on labels that were numbers, so that a folder `7` holds class 7.
        owner: Who knows the classes, for people.
    """

    count: int
    names: tuple[str, ...] | None = None
    others: Mapping[str, int] = field(default_factory=dict)
    numbers: bool = False
    owner: str = "the model"

    def number(self, name: str) -> int | None:
        """Return the number of a class by its name, or None if the model does not know it.

        Example:
            >>> Classes(2, ("cat", "dog")).number("dog")
            1
        """
        found = self._by_name.get(_composed(name))
        return found if found is not None else self.others.get(_plain(name), self._index(name))

    @functools.cached_property
    def _by_name(self) -> dict[str, int]:
        return {_composed(known): number for number, known in enumerate(self.names or ())}

    def _index(self, name: str) -> int | None:
        """Return the number that a name is, where that is a class and classes have no other names."""
        if (self.names and not self.others) or not (name.isascii() and name.isdecimal()):
            return None
        return int(name) if int(name) < self.count else None


def renumbered(splits: Splits, classes: Classes) -> Splits:
    """Return the same images with the labels of a model's classes, mapped by name; labels that are numbers stay.

    The description says where classes of the model are missing, and by what the classes were numbered if not by name.

    Raises:
        DataError: If the data has a class that the model does not know, or nothing says which is which.
    """
    if not (splits.labelled or splits.val_labelled):
        return splits
    if splits.class_names is None:
        if splits.num_classes > classes.count:
            raise DataError(
                f"{splits.description}: labels up to {splits.num_classes - 1}, but {classes.owner} has "
                f"{classes.count} classes, 0 to {classes.count - 1}."
            )
        return dataclasses.replace(splits, num_classes=classes.count, class_names=classes.names)
    own = splits.class_names
    numbers, text = _numbers(splits, classes)
    names = list(classes.names or ())
    names += [f"class {number}" for number in range(len(names), max(numbers) + 1)]
    if classes.names is None:
        for name, number in zip(own, numbers, strict=True):
            names[number] = name
    train, val = splits.train, splits.val
    if numbers != list(range(len(own))):
        train, val = (Renumbered(images, numbers) for images in (train, val))
    if len(own) < classes.count:
        text = f"; {len(own)} of the {classes.count} classes of {classes.owner}{text}"
    return dataclasses.replace(
        splits, train=train, val=val, num_classes=classes.count, class_names=tuple(names),
        description=splits.description + text,
    )  # fmt: skip


def _numbers(splits: Splits, classes: Classes) -> tuple[list[int], str]:
    """Return the model's number of each of the data's classes, and what to say about how it was found."""
    own = splits.class_names or ()
    found = [classes.number(name) for name in own]
    known = [number for number in found if number is not None]
    if len(set(known)) < len(known):
        twice = next(number for number in known if known.count(number) > 1)
        both = [name for name, number in zip(own, found, strict=True) if number == twice]
        raise DataError(f"{splits.description}: {both[0]!r} and {both[1]!r} are the same class of {classes.owner}.")
    same = len(own) == classes.count
    if len(known) == len(own) and (classes.names or classes.numbers or not same):
        return known, "" if classes.names else "; numbered by the names of their folders, which are numbers"
    if classes.names is not None and (known or not classes.others):
        strange = next(name for name, number in zip(own, found, strict=True) if number is None)
        raise DataError(
            f"{splits.description}: {classes.owner} does not know the class {strange!r}."
            f"{nearest(strange, classes.names)} It knows {len(classes.names)}: {few_names(classes.names)}. Take the "
            "folder away, rename it, or give --classes FILE, a name a line in the order of the model's outputs."
        )
    if same:
        return list(range(len(own))), f"; numbered in the order of their names, for {classes.owner} keeps none"
    raise DataError(
        f"{splits.description}: it has {len(own)} classes ({few_names(own)}), {classes.owner} has {classes.count} and "
        f"nothing says which of them these are. Name the folders by class number, 0 to {classes.count - 1}, or give "
        "--classes FILE, a name a line in the order of the model's outputs."
    )


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Return the class names of a text file: a name a line, in the order of a model's outputs.

    Raises:
        DataError: If it cannot be read, holds no name, an empty line or a name twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--classes {path}: could not be read ({error}).") from error
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            what = f"{name!r} a second time" if name else "nothing"
            raise DataError(f"--classes {path}, line {number + 1}: expected a class of its own, found {what}.")
    if not names:
        raise DataError(f"--classes {path}: expected a class name a line, found none.")
    return names


def published_classes(model: nn.Module, source: str | Source | None, count: int | None) -> Classes | None:
    """Return the classes of a model's published weights, by number, synset and words; None if they are not known.

    Args:
        model: The model; timm's carry a configuration of their published weights.
        source: Where the model came from, for torchvision's names.
        count: Number of its outputs; published names of another number are not its own.

    Example:
        >>> import timm
        >>> found = published_classes(timm.create_model("test_resnet"), None, 1000)
        >>> found.number("n01443537"), found.number("goldfish"), found.number("1")
        (1, 1, 1)
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config = getattr(model, "pretrained_cfg", None)
    kind = parse_source(source) if source is not None else None
    columns: list[Sequence[str]] = []
    if config:
        if names := config.get("label_names"):
            columns = [list(names)]
        elif subset := infer_imagenet_subset(dict(config)):
            info = ImageNetInfo(subset)
            columns = [info.label_names(), list(info.label_descriptions())]
    elif kind is not None and kind.kind == "torchvision":
        from torchvision import models

        words = models.get_model_weights(kind.name).DEFAULT.meta.get("categories") or ()
        info = ImageNetInfo()
        columns = [words]
        if len(words) == IMAGENET_CLASSES:
            columns = [info.label_names(), words, list(info.label_descriptions())]
    if not columns or len(columns[0]) != count:
        return None
    return Classes(count, tuple(columns[0]), _aliases(columns), owner=f"{source or type(model).__name__}")


def _aliases(columns: Iterable[Sequence[str]]) -> dict[str, int]:
    """Return each name, and each of the words of a name with commas, that stands for one class alone."""
    found: dict[str, set[int]] = {}
    for names in columns:
        for number, name in enumerate(names):
            for word in {name, *name.split(",")}:
                found.setdefault(_plain(word), set()).add(number)
    return {word: numbers.pop() for word, numbers in found.items() if len(numbers) == 1}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return " ".join(_composed(name).casefold().replace("_", " ").split())
