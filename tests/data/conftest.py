"""Small data sets made of real JPEG bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.images import jpeg


@pytest.fixture
def make_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Write a parquet file with two rows a row group."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def make(images: list[bytes | None], labels: list[int | None], classes: str = "", name: str = "images") -> Path:
        fields = [("image", pa.binary()), ("label", pa.int32())]
        schema = pa.schema(fields, metadata={"classes": classes} if classes else None)
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(pa.table([images, labels], schema=schema), path, row_group_size=2)
        return path

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of JPEG files from {"train/cat": 3, ...}."""

    def make(counts: dict[str, int], size: tuple[int, int] = (32, 32), name: str = "folder") -> Path:
        root = tmp_path / name
        for number, (folder, count) in enumerate(counts.items()):
            (root / folder).mkdir(parents=True)
            for index in range(count):
                (root / folder / f"{index}.jpg").write_bytes(jpeg(100 * number + index, size))
        return root

    return make
