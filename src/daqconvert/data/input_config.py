"""What a model expects of its images, from timm's configuration or torchvision's default weights.

Units: `mean` and `std` are on pixel values in 0..1; `input_size` is `(channels, height, width)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from daqconvert.sources import Source, parse_source


@dataclass(frozen=True)
class InputConfig:
    """What a model expects of its input images.

    Attributes:
        input_size: `(channels, height, width)`.
        mean: Subtracted from pixel values in 0..1, per channel.
        std: Divides the pixel values afterwards, per channel.
        interpolation: timm's word for the filter that resizes, such as `"bilinear"` or `"bicubic"`.
        crop_pct: Share of the resized image's side that evaluation keeps.
        fixed_size: Whether the model takes only images of this size.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    fixed_size: bool = False


def input_config(model: nn.Module, source: str | Source | None = None) -> InputConfig | None:
    """Return what a model expects of its input, or None if neither the model nor its source says it.

    Args:
        model: The model; a timm model carries its own configuration.
        source: Where the model came from; a torchvision model is looked up by name among the default weights.

    Example:
        >>> import timm
        >>> input_config(timm.create_model("test_resnet", in_chans=1)).input_size
        (1, 160, 160)
    """
    config = getattr(model, "pretrained_cfg", None)
    if config:
        return _timm_config(model, config)
    source = parse_source(source) if source is not None else None
    if source is None or source.kind != "torchvision":
        return None
    from torchvision import models

    transforms = models.get_model_weights(source.name).DEFAULT.transforms()
    crop, resize = getattr(transforms, "crop_size", None), getattr(transforms, "resize_size", None)
    if not crop or not resize:
        return None  # a model for detection or segmentation
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    size = (3, crop[0], crop[0])
    return InputConfig(size, mean, std, transforms.interpolation.value, crop[0] / resize[0])


def _timm_config(model: nn.Module, config: Mapping[str, Any]) -> InputConfig:
    from timm.data import resolve_data_config

    resolved = resolve_data_config(pretrained_cfg=dict(config))
    channels, height, width = resolved["input_size"]
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (height, width)
    stem = config.get("first_conv")
    stem = stem[0] if isinstance(stem, (list, tuple)) else stem
    if stem:  # the configuration is that of the published weights, not of a model built with in_chans=
        channels = getattr(model.get_submodule(stem), "in_channels", channels)
    mean, std = resolved["mean"], resolved["std"]
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    fixed = bool(config.get("fixed_input_size"))
    size = (channels, height, width)
    return InputConfig(size, tuple(mean), tuple(std), resolved["interpolation"], resolved["crop_pct"], fixed)
