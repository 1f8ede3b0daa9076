from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from daqconvert.data import ParquetImages
from daqconvert.data.parquet import count_rows
from daqconvert.errors import DataError
from helpers.images import jpeg

IMAGES = [jpeg(seed) for seed in range(5)]
LABELS = [0, 1, 2, 1, 0]


def test_rows_and_names(make_parquet):
    data = ParquetImages(make_parquet(IMAGES, LABELS, "cat,dog,owl"))
    assert (len(data), data.num_classes, data.class_names) == (5, 3, ("cat", "dog", "owl"))
    image, label = data[2]
    assert (image.size, label, data[-1][1]) == ((32, 32), 2, 0)
    with pytest.raises(IndexError):
        data[5]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1, 4), (3, None), (2, 4), (4, 5)])
@pytest.mark.parametrize("cache", [False, True], ids=["lazy", "cached"])
def test_a_part_holds_the_same_rows_as_the_whole(make_parquet, start, stop, cache):
    path = make_parquet(IMAGES, LABELS)
    whole, part = ParquetImages(path), ParquetImages(path, start=start, stop=stop, cache=cache)
    rows = range(5)[start:stop]
    assert len(part) == len(rows)
    for index, row in enumerate(rows):
        assert part[index][1] == LABELS[row]
        assert part[index][0].tobytes() == whole[row][0].convert("RGB").tobytes()
    assert part.num_classes == 3  # of the whole file, so that two parts agree


def test_transform_and_workers(make_parquet):
    data = ParquetImages(make_parquet(IMAGES, LABELS), transform=size_of)
    loader = DataLoader(data, batch_size=5, num_workers=1)
    sizes, labels = next(iter(loader))
    assert sizes.tolist() == [32] * 5
    assert torch.equal(labels, torch.tensor(LABELS))


def size_of(image):
    return image.size[0]


def test_only_images_of_one_size_are_cached(make_parquet):
    path = make_parquet([jpeg(0), jpeg(1, (40, 32))], [0, 1])
    with pytest.raises(DataError, match=r"row 1: 32 x 40 pixels where .* 32 x 32; .*cache=False"):
        ParquetImages(path, cache=True)


@pytest.mark.parametrize("row", [0, 3])
def test_undecodable_image(make_parquet, row):
    images = [*IMAGES]
    images[row] = IMAGES[row][:200]
    path = make_parquet(images, LABELS)
    part = ParquetImages(path, start=row)
    with pytest.raises(DataError, match=rf"images\.parquet, row {row}: its 200 bytes are no readable image"):
        part[0]


@pytest.mark.parametrize("nothing", [None, b""], ids=["null", "empty"])
def test_missing_image(make_parquet, nothing):
    data = ParquetImages(make_parquet([IMAGES[0], nothing], [0, 1]))
    with pytest.raises(DataError, match="row 1: expected an encoded image, found nothing"):
        data[1]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, None], "", "row 1: it has no label"),
        ([0, -1], "", "row 1: label -1"),
        ([2, 0], "cat,dog", "row 0: label 2, expected 0 to 1"),
    ],
    ids=["null", "negative", "beyond the names"],
)
def test_bad_labels(make_parquet, labels, classes, message):
    with pytest.raises(DataError, match=message):
        ParquetImages(make_parquet(IMAGES[:2], labels, classes))


def test_columns(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"img": [b"x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'image'; it has img, label"):
        ParquetImages(path)
    parquet.write_table(pa.table({"image": [b"x"], "label": ["cat"]}), path)
    with pytest.raises(DataError, match="column 'label' should hold integers, found string"):
        ParquetImages(path)
    parquet.write_table(pa.table({"image": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match="column 'image' should hold encoded bytes, found string"):
        ParquetImages(path)


@pytest.mark.parametrize("keep", [0, 3, 500, -20], ids=lambda keep: f"keep{keep}")
def test_damaged_file(make_parquet, keep):
    path = make_parquet(IMAGES, LABELS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"images\.parquet is no parquet file, or a damaged one"):
        ParquetImages(path)


def test_damaged_pages(make_parquet):
    path = make_parquet(IMAGES, LABELS)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"images\.parquet is damaged"):
        ParquetImages(path)


@pytest.mark.parametrize(("start", "stop"), [(5, None), (2, 2), (0, 6), (-1, 3)])
def test_rows_that_are_not_there(make_parquet, start, stop):
    with pytest.raises(DataError, match=r"but it has 5"):
        ParquetImages(make_parquet(IMAGES, LABELS), start=start, stop=stop)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        count_rows(tmp_path / "none.parquet")


def test_without_pyarrow_says_what_to_install(make_parquet, child_env):
    path = make_parquet(IMAGES, LABELS)
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from daqconvert.data import ParquetImages\n"
        "from daqconvert.errors import DataError\n"
        f"try: ParquetImages({str(path)!r})\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_env, check=True)
    assert "pip install 'daqconvert[parquet]'" in done.stdout
