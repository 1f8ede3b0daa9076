"""From a PIL image to what a network takes: a float32 tensor `(channels, height, width)`, normalized.

Large images go through timm's own transforms. Small ones (at most `SMALL` pixels a side, such as CIFAR's) are padded
by an eighth (4 pixels at 32), cropped at random and flipped, as in the paper's training; the rest is timm's again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from daqconvert.data.decoding import eight_bits
from daqconvert.data.input_config import InputConfig
from daqconvert.errors import DataError

SMALL = 64
IMAGENET = InputConfig((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)


@dataclass(frozen=True)
class Augmentation:
    """What training images go through besides crop and flip, in timm's words; the defaults add nothing.

    Attributes:
        augment: Automatic augmentation, such as `"rand-m9-mstd0.5"`, `"augmix-m3-w3"` or `"original"`.
        color_jitter: Strength of changes of brightness, contrast and saturation.
        random_erasing: Probability that a rectangle is replaced by noise.
        crop_scale: Smallest share of a large image that a random crop takes.
    """

    augment: str = ""
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    crop_scale: float = 0.08


PLAIN = Augmentation()


def image_transform(
    config: InputConfig, train: bool, small: bool, flip: bool = True, more: Augmentation = PLAIN
) -> Callable[[Any], Any]:
    """Return the transform from a `PIL.Image` to a normalized tensor of `config.input_size`.

    With `train` it augments: it crops, mirrors if `flip` allows it, and does `more`. `small` says whether the images
    are small, as described at the top of this file.

    Raises:
        DataError: If timm does not know the automatic augmentation.

    Example:
        >>> from PIL import Image
        >>> tuple(image_transform(IMAGENET, train=False, small=False)(Image.new("L", (300, 260))).shape)
        (3, 224, 224)
    """
    from torchvision import transforms

    channels, height, width = config.input_size
    mode = partial(_convert, mode="L" if channels == 1 else "RGB")
    if train:
        cropped, changed, normalized = _timm_training(config, flip, more)
        if small:
            crop = transforms.RandomCrop((height, width), padding=max(height // 8, 1))
            mirror = [transforms.RandomHorizontalFlip()] if flip else []
            cropped = transforms.Compose([transforms.Resize((height, width)), crop, *mirror])
        return transforms.Compose([mode, *cropped.transforms, *changed.transforms, *normalized.transforms])
    if small:
        resize = transforms.Resize((height, width))
        normalize = transforms.Normalize(config.mean, config.std)
        return transforms.Compose([mode, resize, transforms.ToTensor(), normalize])
    from timm.data import create_transform

    return transforms.Compose([mode, create_transform(config.input_size, **_shared(config))])


def _timm_training(config: InputConfig, flip: bool, more: Augmentation) -> tuple[Any, Any, Any]:
    """Return the three parts of timm's transform: crop and flip, the other changes, normalization."""
    from timm.data import create_transform
    from torchvision import transforms

    no_jitter: dict[str, Any] = {"color_jitter": None}  # timm's type hint lacks the None that its code asks for
    try:
        found: Any = create_transform(
            config.input_size, is_training=True, separate=True, scale=(more.crop_scale, 1.0),
            hflip=0.5 if flip else 0.0, auto_augment=more.augment or None, re_prob=more.random_erasing,
            re_mode="pixel", **no_jitter, **_shared(config),
        )  # fmt: skip
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"augment: timm does not know {more.augment!r} ({error or type(error).__name__}). Expected a word such as "
            "rand-m9-mstd0.5, augmix-m3-w3, original, v0 or 3a."
        ) from None
    primary, secondary, final = found
    if more.color_jitter:  # timm has no color jitter together with an automatic augmentation
        secondary.transforms.append(transforms.ColorJitter(*(more.color_jitter,) * 3))
    return primary, secondary, final


def _shared(config: InputConfig) -> dict[str, Any]:
    return {
        "interpolation": config.interpolation, "mean": config.mean, "std": config.std, "crop_pct": config.crop_pct
    }  # fmt: skip


def _convert(image: Any, mode: str) -> Any:
    return eight_bits(image).convert(mode)
