"""Images in a parquet file: a column `image` of encoded bytes (JPEG, PNG, ...) and a column `label`, numbers or names.

Images may also be `struct<bytes, path>`, as Hugging Face's data sets have them; a path, where there are no bytes,
begins at the folder of the file. Columns of other names are found by Hugging Face's own metadata, or if only one can
be meant.

Rows are numbered from 0 over the whole file, even if only a part of it is read. Class names are read from the schema's
metadata: an entry `classes` (comma separated), or Hugging Face's `ClassLabel`. Labels that are texts are their own
names, numbered in sorted order.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from daqconvert.data.decoding import Encoded, decoded
from daqconvert.errors import DataError, nearest

OTHER_NAMES = {"image": ("img", "jpg", "png"), "label": ("labels", "fine_label", "class", "target")}


class ParquetImages(Dataset[tuple[Any, int]]):
    """Rows `start` to `stop` of a parquet file as `(image, label)`; images are decoded when asked for.

    The encoded bytes of the rows are held in memory; other row groups are not read.

    Args:
        path: The file.
        transform: Called with each `PIL.Image` (8 bits a channel, the right way up); None returns the image.
        start: First row.
        stop: One past the last row; None for the end of the file.
        cache: Whether to decode all rows now, into one uint8 tensor `(rows, H, W, 3)` that later reads use.

    Attributes:
        labels: int64 tensor `(rows,)`.
        class_names: Names from the metadata, or None.
        num_classes: Number of class names; without them, the largest label of the whole file plus one.

    Raises:
        DataError: If the file is missing, damaged, lacks a column or holds an impossible label.

    Example:
        >>> ParquetImages("none.parquet")
        Traceback (most recent call last):
        daqconvert.errors.DataError: none.parquet: no such file.
    """

    def __init__(
        self,
        path: str | Path,
        transform: Callable[[Any], Any] | None = None,
        start: int = 0,
        stop: int | None = None,
        cache: bool = False,
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        self.start = start
        images, labels, self.class_names = _read(self.path, start, stop)
        self.num_classes = _num_classes(self.path, labels, self.class_names)
        self.labels = torch.from_numpy(labels[start:stop].astype("int64"))
        self._images = images
        self._cache = self._decode_all() if cache else None

    def part(self, start: int, stop: int) -> ParquetImages:
        """Return rows `start` to `stop` of these, without reading the file again."""
        found = copy.copy(self)
        found.start, found.labels = self.start + start, self.labels[start:stop]
        found._images = self._images.slice(start, stop - start)
        found._cache = None if self._cache is None else self._cache[start:stop]
        return found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path.name}: row {index} of {len(self)}")
        index %= len(self)
        image = self._decode(index) if self._cache is None else _from_pixels(self._cache[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def encoded(self, index: int) -> Encoded:
        """Return an image as it is stored."""
        found, where = self._images[index].as_py(), f"{self.path}, row {self.start + index}"
        if isinstance(found, dict):
            path, found = found.get("path"), found.get("bytes")
            if not found and path:
                return Encoded(str(self.path.parent / path), where)
        return Encoded(found or b"", where)

    def _decode(self, index: int) -> Any:
        return decoded(self.encoded(index))

    def _decode_all(self) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        pixels: list[Tensor] = []
        for index in range(len(self)):
            image = pil_to_tensor(self._decode(index).convert("RGB")).permute(1, 2, 0)
            if pixels and image.shape != pixels[0].shape:
                sizes = [f"{height} x {width}" for height, width, _ in (image.shape, pixels[0].shape)]
                raise DataError(
                    f"{self.path}, row {self.start + index}: {sizes[0]} pixels where the rows before have {sizes[1]}; "
                    "only images of one size can be cached. Use cache=False."
                )
            pixels.append(image)
        return torch.stack(pixels)


def _from_pixels(pixels: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.numpy())


def count_rows(path: str | Path) -> int:
    """Return the number of rows of a parquet file.

    Raises:
        DataError: If the file is missing or damaged.
    """
    return int(_open(Path(path)).metadata.num_rows)


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet files need pyarrow. Run pip install 'daqconvert[parquet]'.") from error
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file, or a damaged one ({_line(error)}).") from error


def _read(path: Path, start: int, stop: int | None) -> tuple[Any, Any, tuple[str, ...] | None]:
    """Return the column of images `start:stop`, the labels of all rows, and the class names."""
    file = _open(path)
    import pyarrow as pa  # after `_open`, which says how to install it

    rows = file.metadata.num_rows
    end = rows if stop is None else stop
    if not 0 <= start < end <= rows:
        raise DataError(f"{path}: rows {start} to {end} asked for, but it has {rows}.")
    image, label = _columns(path, file.schema_arrow)
    groups, first = _groups(file.metadata, start, end)
    try:
        labels = file.read(columns=[label]).column(label)
        images = file.read_row_groups(groups, columns=[image]).column(image).slice(start - first, end - start)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({_line(error)}).") from error
    if labels.null_count:
        raise DataError(f"{path}, row {labels.is_null().index(True).as_py()}: it has no label.")
    names = _names(file.schema_arrow, label)
    if not pa.types.is_integer(labels.type):
        texts = labels.to_pylist()
        names = names or tuple(sorted(set(texts)))
        strange = next((row for row, text in enumerate(texts) if text not in names), None)
        if strange is not None:
            raise DataError(f"{path}, row {strange}: label {texts[strange]!r} is no name of its metadata.")
        numbers = {name: number for number, name in enumerate(names)}
        labels = pa.array([numbers[text] for text in texts], pa.int64())
    return images, labels.to_numpy(), names


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """Return the names of the columns of images and labels, or raise for what is missing or of another type."""
    import pyarrow.types as kinds

    def is_image(t: Any) -> bool:
        if kinds.is_struct(t):
            return any(field.name == "bytes" and is_image(field.type) for field in t)
        return bool(kinds.is_binary(t) or kinds.is_large_binary(t))

    def is_label(t: Any) -> bool:
        return bool(kinds.is_integer(t) or kinds.is_string(t) or kinds.is_large_string(t))

    features, found = _features(schema), []
    for name, what, fits, feature in (
        ("image", "encoded bytes, or a struct of bytes and path", is_image, "Image"),
        ("label", "integers or class names", is_label, "ClassLabel"),
    ):
        told = [key for key, value in features.items() if value.get("_type") == feature and key in schema.names]
        usual = [key for key in OTHER_NAMES[name] if key in schema.names]
        typed = [field.name for field in schema if fits(field.type)] if name == "image" else []
        one = next(
            (keys[0] for keys in ([name] if name in schema.names else [], told, usual, typed) if len(keys) == 1), None
        )
        if one is None:
            raise DataError(
                f"{path}: no column {name!r}; it has {', '.join(schema.names)}.{nearest(name, schema.names)}"
            )
        if not fits(schema.field(one).type):
            raise DataError(f"{path}: column {one!r} should hold {what}, found {schema.field(one).type}.")
        found.append(one)
    return found[0], found[1]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Return what Hugging Face's metadata says of each column; nothing where there is none that can be read."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def _names(schema: Any, label: str) -> tuple[str, ...] | None:
    if text := (schema.metadata or {}).get(b"classes"):
        return tuple(text.decode().split(","))
    names = _features(schema).get(label, {}).get("names")
    return tuple(map(str, names)) if names else None


def _groups(metadata: Any, start: int, end: int) -> tuple[list[int], int]:
    """Return the row groups that hold rows `start:end`, and the number of the first row in them."""
    groups: list[int] = []
    first = at = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if at < end and at + rows > start:
            first = first if groups else at
            groups.append(group)
        at += rows
    return groups, first


def _num_classes(path: Path, labels: Any, names: tuple[str, ...] | None) -> int:
    classes = len(names) if names else int(labels.max()) + 1
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{path}, row {row}: label {int(labels[row])}, expected 0 to {classes - 1}.")
    return classes


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
