"""Inputs, targets and outputs of the networks of the zoo, from seeds.

Every input is what `model(**inputs)` takes, or one tensor; targets are added for detectors in training mode. What is
compared is a list of tensors: all leaves of the output.

For detectors the numbers before box selection are computed by calling the parts in turn: transform, backbone, head
(the RPN's for the two-stage ones), then box, mask and keypoint heads on boxes from a seed, not on selected ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from zoo_models import Network

BATCH = 2  # batch norm in training mode needs more than one value per channel


def inputs(network: Network, seed: int, *, train: bool = False) -> Any:
    """Return a batch: a tensor, or keyword arguments."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if network.task == "optical_flow":
        first = torch.rand(BATCH, *network.size, generator=generator) * 2 - 1
        noise = torch.rand(BATCH, *network.size, generator=generator) * 2 - 1
        return {"image1": first, "image2": 0.9 * first.roll((2, 3), (2, 3)) + 0.1 * noise}
    if network.task == "detection":
        images = [torch.rand(network.size, generator=generator) for _ in range(BATCH)]
        if not train:
            return {"images": images}
        return {"images": images, "targets": [_target(network, generator) for _ in range(BATCH)]}
    return torch.randn(BATCH, *network.size, generator=generator)


def _target(network: Network, generator: torch.Generator) -> dict[str, Tensor]:
    height, width = network.size[-2:]
    boxes = random_boxes(3, height, width, generator)
    masks = torch.zeros(3, height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    points = boxes[:, None, :2] + torch.rand(3, 17, 2, generator=generator) * (boxes[:, None, 2:] - boxes[:, None, :2])
    labels = torch.randint(1, 2 if "keypoint" in network.name else 91, (3,), generator=generator)
    keypoints = torch.cat([points, torch.ones(3, 17, 1)], dim=2)
    return {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": keypoints}


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Return boxes `(count, 4)`, a quarter to a half of the image wide and high."""
    size = torch.tensor([width, height]) * (0.25 + 0.25 * torch.rand(count, 2, generator=generator))
    corner = (torch.tensor([width, height]) - size) * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + size], dim=1)


def call(model: nn.Module, batch: Any) -> Any:
    """Return what the network returns for a batch."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def leaves(output: Any) -> list[Tensor]:
    """Return every tensor of an output."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def is_detector(model: nn.Module) -> bool:
    """Whether the network selects boxes."""
    return hasattr(model, "roi_heads") or (hasattr(model, "transform") and hasattr(model, "anchor_generator"))


def floating(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the floating outputs; of a detector those before box selection."""
    output = before_selection(model, batch["images"]) if is_detector(model) else call(model, batch)
    return [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.numel()]


def everything(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return all outputs, and of a detector those before box selection too."""
    return leaves(call(model, batch)) + (
        leaves(before_selection(model, batch["images"])) if is_detector(model) else []
    )


def before_selection(model: Any, images: list[Tensor]) -> Any:
    """Return what the heads of a detector in evaluation mode compute, on boxes that no network selected."""
    batch, _ = model.transform([image.clone() for image in images], None)
    features = model.backbone(batch.tensors)
    features = {"0": features} if isinstance(features, Tensor) else features
    if not hasattr(model, "roi_heads"):
        return model.head(list(features.values()))
    output = [model.rpn.head(list(features.values()))]
    generator = torch.Generator().manual_seed(7)
    boxes = [random_boxes(8, *size, generator) for size in batch.image_sizes]
    heads = model.roi_heads
    output.append(heads.box_predictor(heads.box_head(heads.box_roi_pool(features, boxes, batch.image_sizes))))
    for kind in ("mask", "keypoint"):
        if getattr(heads, f"{kind}_roi_pool", None) is not None:
            pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, batch.image_sizes)
            output.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
    return output
