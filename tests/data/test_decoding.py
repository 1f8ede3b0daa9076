"""Images of every mode and every kind of damage, and what they become."""

from __future__ import annotations

import io
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from daqconvert.data import check_images, open_splits
from daqconvert.data.decoding import Encoded, decoded, eight_bits
from daqconvert.data.transforms import IMAGENET, image_transform
from daqconvert.errors import DataError
from helpers.images import jpeg


def stored(image: Image.Image, kind: str, **options) -> Encoded:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Encoded(buffer.getvalue(), "here")


def ramp(dtype: str, most: float) -> Image.Image:
    return Image.fromarray(np.linspace(0, most, 16).reshape(4, 4).astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "most", "kind"),
    [("uint16", 65535, "PNG"), ("uint16", 65535, "TIFF"), ("uint16", 65535, "PPM"), ("int32", 65535, "TIFF"),
     ("float32", 1.0, "TIFF")],
)  # fmt: skip
def test_pixels_are_scaled_by_the_range_of_their_type(dtype, most, kind):
    found = decoded(stored(ramp(dtype, most), kind))
    expected = np.linspace(0, 255, 16).reshape(4, 4)
    assert found.mode == "L"
    assert np.abs(np.asarray(found, float) - expected).max() <= 0.51  # neither white nor black: rounded to 8 bits


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (ramp("float32", 255.0), "its floating-point pixels are 0 to 255, expected 0 .black. to 1 .white."),
        (ramp("int32", 70000), "its integer pixels are 0 to 70000, expected 0 .black. to 65535 .white."),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "floating-point pixels are nan to nan"),
        (Image.fromarray(np.full((2, 2), -0.5, np.float32)), "floating-point pixels are -0.5"),
    ],
    ids=["floats to 255", "32 bits", "nan", "negative"],
)
def test_pixels_outside_their_range_are_told(image, told):
    with pytest.raises(DataError, match=f"here: its .* bytes are no readable image .*{told}"):
        decoded(stored(image, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_are_turned_as_their_exif_orientation_says(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white in the corner above, to the left
    turned = {  # how the sensor saw it
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }[orientation](upright)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    found = np.asarray(decoded(stored(image, kind, exif=exif)), float)
    assert found.shape == upright.shape
    assert np.abs(found - upright).mean() < 8  # of 255; JPEG loses a little


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_data_does_not_make_an_image_unreadable():
    assert decoded(stored(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\x00\x00MM\x00*broken")).size == (8, 8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I;16", "I;16B", "I", "F"],
)
def test_every_mode_becomes_what_the_model_takes(mode, channels):
    config = replace(IMAGENET, input_size=(channels, 8, 8), mean=(0.0,) * channels, std=(1.0,) * channels)
    found = image_transform(config, train=False, small=True)(Image.new(mode, (8, 8)))
    assert found.shape == (channels, 8, 8)
    assert bool(torch.isfinite(found).all())


def test_the_colour_under_alpha_counts():
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert decoded(stored(clear, "PNG")).convert("RGB").getpixel((0, 0)) == (200, 100, 50)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert decoded(stored(palette, "PNG", transparency=1)).convert("RGB").getpixel((0, 0)) == (10, 20, 30)


def test_of_an_animation_the_first_frame_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    found = decoded(stored(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert found.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_all_unreadable_images_are_named_at_once(tmp_path):
    good = jpeg(0, (400, 300))
    png = stored(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG").content
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "good.jpg").write_bytes(good)
    bad = {
        "empty.jpg": b"", "cut.jpg": good[: len(good) // 2], "text.png": b"<html>", "cut.png": png[: len(png) // 2],
        "flipped.png": png[:200] + bytes([png[200] ^ 255]) + png[201:],
    }  # fmt: skip
    for name, content in bad.items():
        (tmp_path / "a" / name).write_bytes(content)
    pathlib.Path(tmp_path / "b" / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b" / "really a png.jpg").write_bytes(png)  # the content counts
    splits = open_splits(tmp_path, holdout=3)
    with pytest.raises(DataError, match="6 of 9 images cannot be read") as caught:
        check_images(splits.train, splits.val)
    for name in (*bad, "link.jpg"):
        assert f"{name} is no readable image" in str(caught.value)
    assert "really" not in str(caught.value)


def test_what_is_done_to_images_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.jpg", exif=exif)
    Image.new("RGBA", (8, 8)).save(folder / "2.png")
    Image.new("I;16", (8, 8)).save(folder / "3.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "4.webp", save_all=True, append_images=frames[1:])
    (folder / "5.jpg").write_bytes(jpeg(0))
    (folder / "6.heic").write_bytes(b"x")
    splits = open_splits(tmp_path, holdout=2)
    text = check_images(splits.train, splits.val)
    assert text.startswith("5 images: ")
    for part in (
        "1 turned upright, as their EXIF orientation says", "1 of more than 8 bits, scaled by the range of their type",
        "1 animated, of which the first frame counts", "1 more files are left out, as .heic is no image's suffix here",
    ):  # fmt: skip
        assert part in text
    assert "whose alpha is left out" in text
    assert check_images([]) == ""


def test_rows_of_a_parquet_file(make_parquet):
    splits = open_splits(make_parquet([jpeg(0), b"", None, jpeg(1)[:200], jpeg(2)], [0, 1, 0, 1, 0]), holdout=2)
    with pytest.raises(DataError, match="3 of 5 images cannot be read.*row 1: expected an encoded image"):
        check_images(splits.train, splits.val)


def test_a_huge_image_is_told(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="here: its .* no readable image .Image size .64 pixels. exceeds limit"):
        decoded(stored(Image.new("L", (8, 8)), "PNG"))


def test_images_of_eight_bits_are_not_touched():
    image = Image.new("CMYK", (2, 2))
    assert eight_bits(image) is image
