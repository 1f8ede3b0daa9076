"""Awkward models as data, each with its inputs and the right answer, so that a test can run on all of them.

`Case.converted` names the sites that must be quantized and `Case.skipped` those that must be left alone, each with a
part of the reason that the plan has to give; together they are *all* sites. `NETWORKS` are real networks with random
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import daqconvert as dq
from helpers import awkward_models as awkward


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is right for it.

    Attributes:
        id: Name in test reports.
        make: Builds the model.
        shapes: Shapes of the positional inputs; a dict has those of keyword inputs.
        converted: Sites that are quantized.
        skipped: Sites that are left alone -> part of the reason.
        products: Products of two activations, which are quantized only on request.
        holders: Sites whose quantizers are not in the module of their name -> the module that has them.
        unsigned: Sites whose input is proven non-negative.
        first: First sites.
        last: Last sites.
        order: How the order of the sites is found: `"fx"` or `"modules"`.
        notes: Site -> part of a note on its row.
    """

    id: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] | dict[str, tuple[int, ...]]
    converted: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    products: tuple[str, ...] = ()
    holders: dict[str, str] = field(default_factory=dict)
    unsigned: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    order: str = "fx"
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def modules(self) -> set[str]:
        """Names of the modules that hold the quantizers of the converted sites."""
        return {self.holders.get(name, name) for name in self.converted}

    def batch(self, seed: int = 0) -> dict[str, Tensor] | tuple[Tensor, ...]:
        """Return seeded inputs: a tuple of positional ones, or a dict."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator)
        if isinstance(self.shapes, dict):
            return {name: draw(shape) for name, shape in self.shapes.items()}
        return tuple(draw(shape) for shape in self.shapes)


def run(model: nn.Module, batch: dict[str, Tensor] | tuple[Tensor, ...]) -> Any:
    """Call a model on a case's inputs."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


PRODUCT = "attention product: off"


def projections(name: str) -> dict[str, str]:
    """Where the quantizers of an attention block's input projections are."""
    return {f"{name}.{x}_proj": f"{name}.{x}_proj_site" for x in "qkv"}


def products(name: str) -> tuple[str, str]:
    """The two products of an attention block."""
    return f"{name}.attention_scores", f"{name}.attention_values"


IMAGE = ((2, 3, 9, 9),)
VECTOR = ((3, 4),)

CASES = (
    Case("chain", awkward.Chain, IMAGE, ("0", "3", "7"), unsigned=("3", "7"), first=("0",), last=("7",)),
    Case("residual", awkward.Residual, IMAGE, ("stem", "c1", "c2", "head"), unsigned=("c1", "head"),
         first=("stem",), last=("head",)),
    Case("input-shortcut", awkward.InputShortcut, VECTOR, ("a", "b", "c"), unsigned=("c",),
         first=("a", "b"), last=("c",)),
    Case("called-twice", awkward.CalledTwice, VECTOR, ("a", "mid", "b"), unsigned=("b",), first=("a",), last=("b",)),
    Case("two-names", awkward.TwoNames, VECTOR, ("a", "b"), unsigned=("b",), first=("a",), last=("b",),
         notes={"a": "also named z"}),
    Case("tied", awkward.Tied, VECTOR, ("a", "b", "c"), unsigned=("b", "c"), first=("a",), last=("c",),
         notes={"b": "shares its weight with a"}),
    Case("tied-embedding", awkward.TiedEmbedding, VECTOR, ("mid", "head"), unsigned=("head",),
         first=("mid",), last=("head",), notes={"head": "shares its weight with embed"}),
    Case("root-conv", lambda: nn.Conv2d(3, 4, 3), IMAGE, ("",), first=("",), last=("",)),
    Case("root-linear", lambda: nn.Linear(4, 3), VECTOR, ("",), first=("",), last=("",)),
    Case("functional", awkward.Projection, VECTOR, ("qkv", "proj"), notes={"qkv": "linear called by the model"},
         first=("qkv",), last=("proj",)),
    Case("branch-on-data", awkward.BranchOnData, VECTOR, ("a", "inner.qkv", "inner.proj", "b"),
         first=("a",), last=("b",), order="modules"),
    Case("bare-parameters", awkward.BareParameters, IMAGE, ("a", "kernel", "raw", "b"),
         holders={"kernel": "kernel_site", "raw": "raw_site"}, unsigned=("kernel", "b"), first=("a",), last=("b",)),
    Case("subclass", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), awkward.ShiftedConv(4, 4, 3), nn.Conv2d(4, 2, 1)),
         IMAGE, ("0", "1", "2"), first=("0",), last=("2",)),
    Case("old-weight-norm", awkward.old_weight_norm, VECTOR, ("0", "2"),
         unsigned=("2",), first=("0",), last=("2",)),
    Case("parametrized", awkward.parametrized, VECTOR, ("0", "2"),
         unsigned=("2",), first=("0",), last=("2",)),
    Case("pruned", awkward.pruned, VECTOR, ("0", "2"),
         unsigned=("2",), first=("0",), last=("2",)),
    Case("complex", awkward.complex_first, VECTOR, ("3",), {"1": "complex64"}, unsigned=("3",),
         first=("1",), last=("3",)),
    Case("attention", awkward.Attention, ((2, 3, 8),), ("a", *projections("attn"), "attn.out_proj", "b"),
         holders=projections("attn"), products=products("attn"), unsigned=("attn.attention_values",),
         first=("a",), last=("b",)),
    Case("encoder", lambda: nn.Sequential(
            nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)), ((2, 3, 8),),
         ("0", *projections("1.self_attn"), "1.self_attn.out_proj", "1.linear1", "1.linear2", "2"),
         holders=projections("1.self_attn"), products=products("1.self_attn"),
         unsigned=("1.self_attn.attention_values",), first=("0",), last=("2",)),
    Case("recurrent", awkward.Recurrent, ((2, 3, 4),), ("a", "b"), {"rnn": "recurrent layer"},
         first=("a",), last=("b",)),
    Case("keywords", awkward.KeywordInputs, {"image": (3, 4), "extra": (3, 3)}, ("a", "b", "c"), unsigned=("c",),
         first=("a", "b"), last=("c",)),
    Case("optional", awkward.Optional, VECTOR, ("a", "b"), first=("a",), last=("b",)),
    Case("upsampling", awkward.Upsampling, IMAGE, ("down", "same", "up"), unsigned=("same", "up"),
         first=("down",), last=("up",)),
    Case("caching", awkward.Caching, VECTOR, ("a", "b"), unsigned=("b",), first=("a",), last=("b",)),
    Case("mutating", awkward.Mutating, VECTOR, ("a", "b", "c", "d"), unsigned=("d",), first=("a", "c"), last=("d",)),
    Case("zero-channel", awkward.with_zero_channel, IMAGE, ("0", "3", "7"), unsigned=("3", "7"),
         first=("0",), last=("7",)),
)  # fmt: skip
BY_ID = {case.id: case for case in CASES}


def data(batch: dict[str, Tensor] | tuple[Tensor, ...]) -> list[Any]:
    """Return a case's inputs as the data of a calibration."""
    return [batch if isinstance(batch, dict) else batch[0]]


def quantized(case_id: str = "residual", **settings: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Return a case's float model, the model quantized and calibrated, and the inputs."""
    case = BY_ID[case_id]
    model = case.make().eval()
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, data(case.batch()))
    return model, qmodel, case.batch()


# Every constructor argument of every family: class, arguments, and the shape of one input (no batch dimension)
GEOMETRIES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, (4, 6), {}, (4,)),
    "linear-nobias": (nn.Linear, (4, 1), {"bias": False}, (5, 4)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"dilation": 2}, (4, 11)),
    "conv2d": (nn.Conv2d, (4, 6, (3, 2)), {"stride": (1, 2)}, (4, 8, 9)),
    "conv3d": (nn.Conv3d, (2, 3, 2), {"padding": 1}, (2, 4, 5, 4)),
    "depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4}, (4, 6, 6)),
    "grouped-dilated": (nn.Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2, "bias": False}, (4, 8, 8)),
    "same": (nn.Conv2d, (4, 6, 3), {"padding": "same", "dilation": 2}, (4, 7, 7)),
    "zeros": (nn.Conv2d, (4, 6, 3), {"padding": 2}, (4, 6, 6)),
    "reflect": (nn.Conv2d, (4, 6, 3), {"padding": 2, "padding_mode": "reflect"}, (4, 6, 6)),
    "replicate": (nn.Conv2d, (4, 6, 3), {"padding": (0, 2), "padding_mode": "replicate"}, (4, 6, 6)),
    "circular": (nn.Conv2d, (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (4, 6, 6)),
    "same-circular": (nn.Conv1d, (4, 6, 5), {"padding": "same", "padding_mode": "circular"}, (4, 9)),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {"groups": 2}, (4, 7)),
    "transposed2d": (
        nn.ConvTranspose2d,
        (4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2},
        (4, 5, 6),
    ),
    "transposed3d": (nn.ConvTranspose3d, (2, 3, 2), {"stride": 2}, (2, 3, 4, 3)),
}

# Ways to quantize that every case has to survive; inputs of the cases may be negative, so they get 2 bits or more
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "w4a4": {"w_bits": 4, "a_bits": 4},
    "w2a2": {"w_bits": 2, "a_bits": 2, "first": (2, 2), "last": (2, 2)},
    "paper": {"preset": "paper-w2a2", "first": (2, 2), "last": (2, 2)},
    "paper-weights": {"preset": "paper-w1a32", "first": (1, None), "last": (1, None)},
    "midrise": {"w_bits": 3, "a_bits": 5, "grid": "midrise", "normalize": False, "rounding": "ste"},
    "tensor": {"w_bits": 5, "a_bits": 8, "granularity": "tensor", "slope": "paper"},
    "normalized": {"w_bits": 8, "a_bits": 3, "normalize": True},
    "inputs-only": {"w_bits": None, "a_bits": 4, "first": (None, 8), "last": (8, None)},
}


def timm_network(name: str, **kwargs: Any) -> nn.Module:
    """A timm model with random weights; timm is imported here, for it takes a second."""
    import timm

    return timm.create_model(name, pretrained=False, **kwargs)


def torchvision_network(name: str, **kwargs: Any) -> nn.Module:
    """A torchvision model with random weights."""
    import torchvision

    return torchvision.models.get_model(name, weights=None, **kwargs)


# Small real networks: how to build them, and the side of a square input that is enough for them
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (partial(timm_network, "resnet18", num_classes=10), 64),
    "lite0": (partial(timm_network, "tf_efficientnet_lite0", num_classes=10), 64),
    "vit": (partial(timm_network, "vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2), 32),
    "mobilenet_v2": (partial(torchvision_network, "mobilenet_v2", num_classes=10), 64),
    "lraspp": (partial(torchvision_network, "lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=4), 64),
}
