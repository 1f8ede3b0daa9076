from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
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
    parquet.write_table(pa.table({"imag": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'image'; it has imag, label.* Nearest: imag"):
        ParquetImages(path)
    parquet.write_table(pa.table({"image": [b"x"], "label": [0.5]}), path)
    with pytest.raises(DataError, match="column 'label' should hold integers or class names, found double"):
        ParquetImages(path)
    parquet.write_table(pa.table({"image": ["x"], "label": [0]}), path)
    with pytest.raises(
        DataError, match="column 'image' should hold encoded bytes, or a struct of bytes and path, found string"
    ):
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


def hugging_face(tmp_path, columns, features, name="hf"):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(columns)
    info = json.dumps({"info": {"features": features}})
    path = tmp_path / f"{name}.parquet"
    parquet.write_table(table.replace_schema_metadata({"huggingface": info}), path)
    return path


def test_the_layout_of_hugging_face(tmp_path):
    (tmp_path / "beside.jpg").write_bytes(jpeg(2))
    images = [
        {"bytes": jpeg(0), "path": "a.jpg"},
        {"bytes": jpeg(1), "path": None},
        {"bytes": None, "path": "beside.jpg"},
    ]
    features = {"img": {"_type": "Image"}, "fine": {"names": ["red, dark", "blue"], "_type": "ClassLabel"}}
    rows = ParquetImages(hugging_face(tmp_path, {"img": images, "fine": [1, 0, 1], "id": [7, 8, 9]}, features))
    assert (rows.class_names, rows.num_classes) == (("red, dark", "blue"), 2)
    for number, label in enumerate([1, 0, 1]):
        found = rows[number]
        assert found[1] == label
        assert found[0].tobytes() == Image.open(io.BytesIO(jpeg(number))).tobytes()


def test_labels_that_are_texts(tmp_path):
    columns = {"image": [jpeg(i) for i in range(3)], "label": ["dog", "cat", "dog"]}
    rows = ParquetImages(hugging_face(tmp_path, columns, {}))
    assert (rows.class_names, [label for _, label in rows]) == (("cat", "dog"), [1, 0, 1])
    features = {"label": {"names": ["dog"], "_type": "ClassLabel"}}
    with pytest.raises(DataError, match="row 1: label 'cat' is no name of its metadata"):
        ParquetImages(hugging_face(tmp_path, columns, features))


def test_columns_that_could_be_meant_are_not_guessed(tmp_path):
    columns = {"left": [jpeg(0)], "right": [jpeg(0)], "label": [0]}
    with pytest.raises(DataError, match="no column 'image'; it has left, right, label"):
        ParquetImages(hugging_face(tmp_path, columns, {}))
    columns = {"image": [jpeg(0)], "coarse": [0], "fine": [0]}
    features = {key: {"_type": "ClassLabel", "names": ["a"]} for key in ("coarse", "fine")}
    with pytest.raises(DataError, match="no column 'label'; it has image, coarse, fine"):
        ParquetImages(hugging_face(tmp_path, columns, features))


def test_a_part_is_the_same_rows(make_parquet):
    path = make_parquet([jpeg(i) for i in range(6)], [0, 1, 2, 0, 1, 2])
    for cache in (False, True):
        part, own = ParquetImages(path, cache=cache).part(2, 5), ParquetImages(path, start=2, stop=5)
        assert [label for _, label in part] == [label for _, label in own] == [2, 0, 1]
        assert part[1][0].convert("RGB").tobytes() == own[1][0].convert("RGB").tobytes()
