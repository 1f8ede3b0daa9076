"""The networks of `qat_step.py`, one fixed random batch for each, and the layers that every contender quantizes.

The layers come from the plan of `daqconvert` at W4A4 with first and last in float: all convolutions and linear layers
but those two, and no products of attention. Whether an input is signed is found by running the float network on the
batch, once for all contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BITS = 4
SEED = 0
STATISTICS_PASSES = 2  # random weights and untouched batch-norm statistics give inputs that no training would see


@dataclass(frozen=True)
class Network:
    """One network and its batch.

    Attributes:
        key: Its name on the command line.
        make: Builds the network with random weights.
        pixels: Height and width of the input.
        batch: Images in a step.
        classes: Number of outputs.
        lr: Learning rate of SGD at which the float network overfits the batch.
    """

    key: str
    make: Callable[[], nn.Module]
    pixels: int
    batch: int
    classes: int
    lr: float


def _resnet20() -> nn.Module:
    from benchmarks.networks.resnet20 import ResNet20

    return ResNet20()


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(weights=None)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(weights=None)


def _deit_tiny() -> nn.Module:
    import timm

    return timm.create_model("deit_tiny_patch16_224", pretrained=False)


NETWORKS = {
    network.key: network
    for network in (
        Network("resnet20", _resnet20, 32, 128, 10, 0.02),
        Network("resnet18", _resnet18, 64, 32, 1000, 0.02),
        Network("mobilenet_v2", _mobilenet_v2, 64, 32, 1000, 0.02),
        Network("deit_tiny", _deit_tiny, 224, 8, 1000, 0.005),
    )
}


@dataclass(frozen=True)
class Task:
    """A network ready to be converted by every contender.

    Attributes:
        network: Which network.
        model: The float network in training mode, with random weights and statistics of the batch; contenders copy it.
        x: Images.
        y: Classes.
        signed: Name of each layer to quantize -> whether its input has negative values.
    """

    network: Network
    model: nn.Module
    x: Tensor
    y: Tensor
    signed: dict[str, bool] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the layers to quantize."""
        return list(self.signed)


def task(key: str) -> Task:
    """Return a network with its batch and the names of the layers to quantize; the same on every call."""
    network = NETWORKS[key]
    torch.manual_seed(SEED)
    model = network.make().train()
    x = torch.randn(network.batch, 3, network.pixels, network.pixels)
    y = torch.randint(network.classes, (network.batch,))
    with torch.no_grad():
        for _ in range(STATISTICS_PASSES):
            model(x)
    names = planned(model)
    lowest: dict[str, float] = {}
    with torch.no_grad(), inputs_seen(model, names, lambda name, x: lowest.__setitem__(name, float(x.min()))):
        model(x)
    if set(lowest) != set(names):
        raise SystemExit(f"{key}: planned layers that the forward never calls: {sorted(set(names) - set(lowest))}")
    return Task(network, model, x, y, {name: lowest[name] < 0 for name in names})


def planned(model: nn.Module) -> list[str]:
    """Return the layers that our plan converts, after checking that these are all layers but the first and the last.

    Raises:
        SystemExit: If they are not, or if the plan has anything but convolutions and linear layers.
    """
    import daqconvert as dq

    names = [row.name for row in dq.plan(model, w_bits=BITS, a_bits=BITS, first=None, last=None).converted]
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if type(module) in (nn.Conv2d, nn.Linear)]
    left = [name for name in layers if name not in names]
    if not set(names) <= set(layers) or left != [layers[0], layers[-1]]:
        raise SystemExit(f"{type(model).__name__}: expected all layers but first and last; left are {left}")
    return names


@contextmanager
def inputs_seen(model: nn.Module, names: list[str], see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call `see(name, input)` before each of these layers computes, while the context lasts."""
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0].detach()) and None

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
