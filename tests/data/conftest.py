"""Small data sets made of real JPEG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (32, 32)) -> bytes:
    """Bytes of one JPEG of random pixels, `size` as (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


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
