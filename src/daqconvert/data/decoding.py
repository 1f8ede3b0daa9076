"""From the bytes of a file to an image of 8 bits a channel, the right way up; and whether that can be done at all.

Pixels are scaled by the range of their type: 16-bit ones by 65535, floating-point ones by 1, and what is outside that
range is an error, not white or black. An image is turned as its EXIF orientation says, as viewers show it (timm's and
torchvision's own loaders do not). Alpha is left out, as in theirs: a transparent pixel has the colour that is stored
for it. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch.utils.data import TensorDataset

from daqconvert.errors import DataError
from daqconvert.report.progress import progress

ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
SIXTEEN, EIGHT = 65535, 255
OTHERS = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}  # modes that Pillow converts to these alone
THREADS = 8  # that decode; Pillow's decoders leave the interpreter free
AT_ONCE = 1024  # images that wait for a thread


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
        content: The path of a file, or its bytes.
        where: What messages call it.
    """

    content: str | bytes
    where: str

    @property
    def called(self) -> str:
        """How a sentence about it begins."""
        return (
            f"{self.where} is" if isinstance(self.content, str) else f"{self.where}: its {len(self.content)} bytes are"
        )

    def open(self) -> Any:
        """Return the image, its pixels not read yet."""
        from PIL import Image

        return Image.open(self.content if isinstance(self.content, str) else io.BytesIO(self.content))


def decoded(encoded: Encoded) -> Any:
    """Return an image with 8 bits a channel, the right way up, in a mode that Pillow can convert to grey and colour.

    Raises:
        DataError: If it cannot be read, or its pixels are not in the range of their type.
    """
    if not encoded.content:
        raise DataError(f"{encoded.where}: expected an encoded image, found nothing.")
    try:
        with encoded.open() as image:
            image.load()
            return _upright(eight_bits(image), _orientation(image)).copy()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... for damaged files
        raise DataError(f"{encoded.called} no readable image ({_line(error)}).") from error


def eight_bits(image: Any) -> Any:
    """Return a `PIL.Image` whose pixels were scaled from the range of their type to 0..255, if they had another.

    Modes of 8 bits (grey, colour, palettes, with alpha, CMYK) stay as they are.

    Raises:
        DataError: If pixels are outside the range: floating-point ones of 0 to 1, integers of 16 bits.

    Example:
        >>> from PIL import Image
        >>> eight_bits(Image.new("F", (2, 2), 0.5)).getextrema()
        (128, 128)
    """
    if image.mode in OTHERS:
        return image.convert(OTHERS[image.mode])
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image, dtype="float64")
    most = 1.0 if image.mode == "F" else float(SIXTEEN)
    if not (pixels.min() >= 0 and pixels.max() <= most):  # NaN is in no range
        kind = "floating-point" if image.mode == "F" else "integer"
        raise DataError(
            f"its {kind} pixels are {pixels.min():g} to {pixels.max():g}, expected 0 (black) to {most:g} (white): "
            "store it with 8 or 16 bits"
        )
    return Image.fromarray((pixels * (EIGHT / most) + 0.5).astype("uint8"))


def _orientation(image: Any) -> int:
    """Return the EXIF orientation of an image, 1 where there is none or nothing that can be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # NOTE: any error of Pillow's parsers: damaged EXIF data does not make the pixels unreadable
        return 1


def _upright(image: Any, orientation: int) -> Any:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    turn = turns.get(orientation)
    return image if turn is None else image.transpose(turn)


# Whether all images of a data set can be read.


def check_images(*datasets: Any, show: bool = True) -> str:
    """Look at every image of some data sets once, and return what is done to some of them; "" where that is nothing.

    A JPEG is decoded at an eighth of its size, and of a PNG the checksums are compared, which finds what is truncated
    or damaged in a fraction of the time that an epoch takes to decode them; other files are decoded as a whole.

    Args:
        datasets: Data sets of `(image, label)`, as in `Splits`, or the `dataset` of a loader from `create_loaders`.
        show: Show a bar where standard error is a terminal.

    Raises:
        DataError: If there are images that cannot be read; names all of them.

    Example:
        >>> check_images([])
        ''
    """
    jobs = [(images, index) for images in datasets for index in range(len(images))]
    remarks: Counter[str] = Counter()
    problems: dict[str, None] = {}  # each once: two data sets may share images
    with progress(len(jobs), "checking images", enabled=show) as bar, ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(jobs), AT_ONCE):
            for problem, found in pool.map(_examined, jobs[start : start + AT_ONCE]):
                remarks.update(found)
                problems.update({problem: None} if problem else {})
                bar.advance()
    if problems:
        raise DataError(
            f"{len(problems)} of {len(jobs)} images cannot be read; replace them or take them away: "
            + "; ".join(problems)
        )
    for others in {id(base): base.others() for base in map(_base, datasets) if hasattr(base, "others")}.values():
        remarks.update(others)
    return f"{len(jobs)} images: " + ", ".join(f"{n} {what}" for what, n in remarks.items()) if remarks else ""


def _base(images: Any) -> Any:
    while hasattr(images, "dataset") or hasattr(images, "images"):
        images = images.dataset if hasattr(images, "dataset") else images.images
    return images


def _examined(job: tuple[Any, int]) -> tuple[str, list[str]]:
    """Return what is wrong with one image of a data set, "" for nothing, and what is done to it when it is read."""
    images, index = job
    while hasattr(images, "dataset") or hasattr(images, "images"):
        if hasattr(images, "indices"):  # torch's `Subset`
            index = images.indices[index]
        images = images.dataset if hasattr(images, "dataset") else images.images
    if isinstance(images, TensorDataset):
        return "", []
    try:
        if not hasattr(images, "encoded"):  # a data set of another library, which decodes for itself
            images[index]
            return "", []
        return "", _remarks(images.encoded(index))
    except Exception as error:  # NOTE: any error of any library: the point is to name them all
        return _line(error), []


def _remarks(encoded: Encoded) -> list[str]:
    """Read an image as cheaply as shows whether it can be read, and return what is done to it when it is decoded."""
    if not encoded.content:
        raise DataError(f"{encoded.where}: expected an encoded image, found nothing.")
    try:
        with encoded.open() as image:
            found = [text for text, applies in REMARKS.items() if applies(image)]
            if image.format != "PNG":
                small = max(1, image.width // 8), max(1, image.height // 8)
                image.draft(None, small)  # does nothing to formats other than JPEG
                image.load()
                eight_bits(image)
                return found
        with encoded.open() as image:  # `verify` wants it as it was opened
            image.verify()
        return found
    except Exception as error:  # as in `decoded`
        raise DataError(f"{encoded.called} no readable image ({_line(error)})") from error


def _is_turned(image: Any) -> bool:
    if image.format == "PNG" and "exif" not in image.info:  # to look for it after the pixels would decode them all
        return False
    return 2 <= _orientation(image) <= 8


def _has_alpha(image: Any) -> bool:
    return image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info


REMARKS: dict[str, Callable[[Any], bool]] = {
    "turned upright, as their EXIF orientation says": _is_turned,
    "whose alpha is left out": _has_alpha,
    "of more than 8 bits, scaled by the range of their type": lambda image: image.mode == "F" or image.mode[0] == "I",
    "animated, of which the first frame counts": lambda image: (
        bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    ),
}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
