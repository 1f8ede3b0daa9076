"""Images in a parquet file: a column `image` of encoded bytes (JPEG, PNG, ...) and an integer column `label`.

Rows are numbered from 0 over the whole file, even if only a part of it is read. Class names are read from the schema's
metadata entry `classes` (comma separated) where there is one.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from daqconvert.errors import DataError, nearest


class ParquetImages(Dataset[tuple[Any, int]]):
    """Rows `start` to `stop` of a parquet file as `(image, label)`; images are decoded when asked for.

    The encoded bytes of the rows are held in memory; other row groups are not read.

    Args:
        path: The file.
        transform: Called with each `PIL.Image` (in its own mode); None returns the image.
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
        table, labels, self.class_names = _read(self.path, start, stop)
        self.num_classes = _num_classes(self.path, labels, self.class_names)
        self.labels = torch.from_numpy(labels[start:stop].astype("int64"))
        self._images = table.column("image")
        self._cache = self._decode_all() if cache else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path.name}: row {index} of {len(self)}")
        index %= len(self)
        image = self._decode(index) if self._cache is None else _from_pixels(self._cache[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def _decode(self, index: int) -> Any:
        from PIL import Image

        data = self._images[index].as_py()
        where = f"{self.path}, row {self.start + index}"
        if not data:
            raise DataError(f"{where}: expected an encoded image, found nothing.")
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... for damaged files
            raise DataError(f"{where}: its {len(data)} bytes are no readable image ({error}).") from error
        return image

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
    """Return the table of images `start:stop`, the labels of all rows, and the class names."""
    file = _open(path)
    import pyarrow as pa  # after `_open`, which says how to install it

    rows = file.metadata.num_rows
    end = rows if stop is None else stop
    if not 0 <= start < end <= rows:
        raise DataError(f"{path}: rows {start} to {end} asked for, but it has {rows}.")
    _check_columns(path, file.schema_arrow)
    groups, first = _groups(file.metadata, start, end)
    try:
        labels = file.read(columns=["label"]).column("label")
        images = file.read_row_groups(groups, columns=["image"]).slice(start - first, end - start)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged ({_line(error)}).") from error
    if labels.null_count:
        raise DataError(f"{path}, row {labels.is_null().index(True).as_py()}: it has no label.")
    names = (file.schema_arrow.metadata or {}).get(b"classes")
    return images, labels.to_numpy(), tuple(names.decode().split(",")) if names else None


def _check_columns(path: Path, schema: Any) -> None:
    import pyarrow.types as kinds

    for name, what, fits in (
        ("image", "encoded bytes", lambda t: kinds.is_binary(t) or kinds.is_large_binary(t)),
        ("label", "integers", kinds.is_integer),
    ):
        if name not in schema.names:
            found = ", ".join(schema.names)
            raise DataError(f"{path}: no column {name!r}; it has {found}.{nearest(name, schema.names)}")
        if not fits(schema.field(name).type):
            raise DataError(f"{path}: column {name!r} should hold {what}, found {schema.field(name).type}.")


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
