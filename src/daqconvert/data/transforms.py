"""From a PIL image to what a network takes: a float32 tensor `(channels, height, width)`, normalized.

Large images go through timm's own transforms; small ones (at most `SMALL` pixels a side, as CIFAR's) through a random
crop after padding by an eighth (4 pixels at 32) and a flip, as the paper trains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from daqconvert.data.input_config import InputConfig

SMALL = 64
IMAGENET = InputConfig((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", 0.875)


def image_transform(config: InputConfig, train: bool, small: bool, flip: bool = True) -> Callable[[Any], Any]:
    """Return the transform from a `PIL.Image` to a normalized tensor of `config.input_size`.

    Args:
        config: Size, normalization and interpolation.
        train: Whether to augment.
        small: Whether the images are small ones.
        flip: Whether augmenting may mirror an image.

    Example:
        >>> from PIL import Image
        >>> tuple(image_transform(IMAGENET, train=False, small=False)(Image.new("L", (300, 260))).shape)
        (3, 224, 224)
    """
    from torchvision import transforms

    channels, height, width = config.input_size
    mode = partial(_convert, mode="L" if channels == 1 else "RGB")
    if not small:
        from timm.data import create_transform

        no_jitter: dict[str, Any] = {"color_jitter": None}  # timm's own hint does not allow what its code asks for
        inner = create_transform(
            input_size=config.input_size,
            is_training=train,
            hflip=0.5 if flip else 0.0,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
            crop_pct=config.crop_pct,
            **no_jitter,
        )
        return transforms.Compose([mode, inner])
    steps: list[Any] = [mode, transforms.Resize((height, width))]
    if train:
        steps.append(transforms.RandomCrop((height, width), padding=max(height // 8, 1)))
        steps += [transforms.RandomHorizontalFlip()] if flip else []
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(config.mean, config.std)])


def _convert(image: Any, mode: str) -> Any:
    return image.convert(mode)
