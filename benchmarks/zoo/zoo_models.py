"""Which networks the zoo holds, and how to build one: timm and torchvision, random weights from a seed, no download.

timm: the smallest network (by parameters) of each family; a family is the Python module that registers the name
(`timm.list_modules()`, 98 of them in timm 1.0). torchvision: the smallest of each classification family, and all
segmentation, detection, video and optical-flow networks, smallest first. The choice and the input sizes are kept in
`zoo_networks.json`, so that a run starts at once; `python benchmarks/zoo/zoo_models.py` makes that file again, in
minutes.

The input size is the smallest of 128, 160, 192, 224 pixels and the network's own size that it accepts in both modes.
Below 128 pixels the last maps have so few positions that the statistics of a batch of two mean nothing.

The second half of the file makes their inputs and targets from seeds and flattens their outputs. An input is what
`model(**inputs)` takes, or one tensor; targets are added for detectors in training mode. What is compared is a list of
tensors: all leaves of the output. For detectors the numbers before box selection are computed by calling the parts in
turn: transform, backbone, head (the RPN's for the two-stage ones), then box, mask and keypoint heads on boxes from a
seed, not on selected ones.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CHOICE = Path(__file__).parent / "zoo_networks.json"
PIXELS = (128, 160, 192, 224)
CLIPS = ((8, 112), (16, 112), (16, 224))  # frames, pixels
CLASSIFICATION = (  # a name belongs to the first family that it starts with
    "alexnet", "convnext", "densenet", "efficientnet_v2", "efficientnet", "googlenet", "inception", "maxvit",
    "mnasnet", "mobilenet_v2", "mobilenet_v3",
    "regnet_x", "regnet_y", "resnext", "resnet", "shufflenet", "squeezenet", "swin_v2",
    "swin", "vgg", "vit", "wide_resnet",
)  # fmt: skip
TWO_STAGE = {
    "rpn_post_nms_top_n_train": 64, "rpn_post_nms_top_n_test": 64,
    "box_score_thresh": 0.0, "box_detections_per_img": 8,
}  # fmt: skip
ONE_STAGE = {"score_thresh": 0.0, "topk_candidates": 64, "detections_per_img": 8}

BATCH = 2  # batch norm in training mode needs more than one value per channel


@dataclasses.dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes:
        group: `"timm"` or `"torchvision"`.
        task: `"classification"`, `"segmentation"`, `"detection"`, `"video"` or `"optical_flow"`.
        name: Its name in the library.
        family: The family that it represents.
        params: Number of parameters.
        size: Shape of one input, without the batch.
        kwargs: Further arguments of the builder.
    """

    group: str
    task: str
    name: str
    family: str
    params: int = 0
    size: tuple[int, ...] = (3, 224, 224)
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """Library and name: the key of its results."""
        return f"{self.group}/{self.name}"

    def build(self, seed: int = 0) -> nn.Module:
        """Return the network in evaluation mode, its weights drawn from a seed."""
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.group == "timm":
                import timm

                return timm.create_model(self.name, pretrained=False, **self.kwargs).eval()
            from torchvision.models import get_model

            return get_model(self.name, weights=None, **self.kwargs).eval()


def networks() -> list[Network]:
    """Return the networks chosen, timm first, in each library the smallest first."""
    rows = json.loads(CHOICE.read_text())["networks"]
    return [Network(**{**row, "size": tuple(row["size"])}) for row in rows]


def find(key: str) -> Network:
    """Return the network of this name, with or without its library."""
    for network in networks():
        if key in (network.key, network.name):
            return network
    raise SystemExit(f"{key}: no network of {CHOICE.name}")


def timm_smallest() -> list[Network]:
    """Return the smallest network of each timm family; every name is built on `meta` (minutes)."""
    import timm
    from timm.models import model_entrypoint

    best: dict[str, Network] = {}
    for name in timm.list_models():
        family = model_entrypoint(name).__module__
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        params = sum(p.numel() for p in model.parameters())
        if family not in best or params < best[family].params:
            size = tuple(model.pretrained_cfg.get("input_size") or (3, 224, 224))
            best[family] = Network("timm", "classification", name, family.split(".")[-1], params, size)
    return sorted(best.values(), key=lambda n: n.params)


def torchvision_chosen() -> list[Network]:
    """Return the smallest of every classification family and all networks of the other tasks."""
    from torchvision import models

    best: dict[str, Network] = {}
    for name in models.list_models(module=models):
        family = next(f for f in CLASSIFICATION if name.startswith(f))  # a new family must be added above
        network = _counted(Network("torchvision", "classification", name, family, 0, (3, 224, 224), _kwargs(name)))
        if family not in best or network.params < best[family].params:
            best[family] = network
    chosen = sorted(best.values(), key=lambda n: n.params)
    for task in ("segmentation", "detection", "video", "optical_flow"):
        names = models.list_models(module=getattr(models, task))
        found = [_counted(Network("torchvision", task, n, n, 0, _own_size(n, task), _kwargs(n, task))) for n in names]
        chosen += sorted(found, key=lambda n: n.params)
    return chosen


def _kwargs(name: str, task: str = "classification") -> dict[str, Any]:
    """Return arguments of a torchvision builder: no backbone weights; few boxes, but some even from random weights."""
    if name in ("googlenet", "inception_v3"):
        return {"init_weights": False}  # SciPy's draw takes minutes; torch's own is as random
    if task == "segmentation":
        return {"weights_backbone": None}
    if task != "detection":
        return {}
    if name.startswith("ssd"):
        return {"weights_backbone": None, **ONE_STAGE}
    size = {"min_size": 160, "max_size": 160}
    return {"weights_backbone": None, **(ONE_STAGE if name.startswith(("fcos", "retinanet")) else TWO_STAGE), **size}


def _own_size(name: str, task: str) -> tuple[int, ...]:
    if task == "video":
        return (3, 16, 224, 224)
    if task == "detection":
        return (
            (3, 300, 300) if name == "ssd300_vgg16" else (3, 320, 320) if name.startswith("ssdlite") else (3, 160, 160)
        )
    return (3, 128, 128) if task == "optical_flow" else (3, 224, 224)


def _counted(network: Network) -> Network:
    from torchvision.models import get_model_weights

    weights = next(iter(get_model_weights(network.name)))  # metadata of the weights alone: nothing is downloaded
    return dataclasses.replace(network, params=int(weights.meta["num_params"]))


def sizes(network: Network) -> list[tuple[int, ...]]:
    """Return the input sizes to try, the smallest first, the network's own last."""
    own = network.size
    if network.task == "video":
        return [(3, frames, p, p) for frames, p in CLIPS]
    if network.task in ("detection", "optical_flow"):
        return [own]
    return [(own[0], p, p) for p in PIXELS if p < own[-1]] + [own]


def accepted_size(network: Network) -> tuple[int, ...]:
    """Return the smallest size that the network accepts in both modes."""
    model = network.build()
    for size in sizes(network):
        sized = dataclasses.replace(network, size=size)
        try:
            with torch.no_grad():
                call(model.eval(), inputs(sized, 0))
                call(model.train(), inputs(sized, 0, train=True))
        except Exception:
            continue
        return size
    return network.size


def choose() -> None:
    """Choose networks and sizes again and write `zoo_networks.json`; each size is tried in a process of its own."""
    rows = []
    for network in timm_smallest() + torchvision_chosen():
        row = dataclasses.asdict(network)
        command = [sys.executable, __file__, "--size", json.dumps(row)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        row["size"] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else list(network.size)
        print(network.key, network.params, row["size"], "" if done.returncode == 0 else "NOT ACCEPTED", flush=True)
        rows.append(row)
    versions = {package: importlib.metadata.version(package) for package in ("timm", "torchvision")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = CHOICE.with_suffix(".tmp")
    temporary.write_text(f'{{"versions": {json.dumps(versions)}, "networks": [\n{lines}\n]}}\n')
    temporary.replace(CHOICE)


# --------------------------------------------------------------------------------------------- inputs and outputs


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
    """Return the floating outputs; for a detector, those before box selection."""
    output = before_selection(model, batch["images"]) if is_detector(model) else call(model, batch)
    return [leaf for leaf in leaves(output) if leaf.is_floating_point() and leaf.numel()]


def everything(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return all outputs; for a detector, also those before box selection."""
    return leaves(call(model, batch)) + (
        leaves(before_selection(model, batch["images"])) if is_detector(model) else []
    )


def before_selection(model: Any, images: list[Tensor]) -> Any:
    """Return the outputs of a detector's heads in evaluation mode, on random boxes."""
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


if __name__ == "__main__":
    if sys.argv[1:2] == ["--size"]:
        torch.set_num_threads(1)
        print(json.dumps(accepted_size(Network(**json.loads(sys.argv[2])))))
    else:
        choose()
