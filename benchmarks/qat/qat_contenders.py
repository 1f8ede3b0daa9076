"""The contenders of `qat_step.py`: how each is made from a float network. All must quantize the same layers."""

from __future__ import annotations

import copy
import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import daqconvert as dq
from benchmarks import common
from benchmarks.qat import qat_peers
from benchmarks.qat.qat_layers import Lsq, Reference, replaced
from benchmarks.qat.qat_networks import BITS, Task, inputs_seen

MOMENTUM = 0.9
QUANTIZER_LR = 0.01
"""Learning rate of steps, bounds and scales over that of the weights: their gradients are sums over whole tensors."""


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: On the command line and in the tables.
        group: `"float"`, `"ours"`, `"peer"`, or `"reference"`, which the target does not count as a peer.
        package: Package that it needs.
        convert: Function of a copy of the float network and the task that returns the network to train.
        quantized: Function of that network that returns the names of layers whose weight and input are quantized.
    """

    name: str
    group: str
    package: str
    convert: Callable[[nn.Module, Task], nn.Module]
    quantized: Callable[[nn.Module], set[str]]

    @property
    def installed(self) -> bool:
        """Whether a contender's package can be imported."""
        return importlib.util.find_spec(self.package) is not None


def _ours(model: nn.Module, task: Task, **settings: Any) -> nn.Module:
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, [task.x])
    return qmodel.train()


def _ours_quantized(model: nn.Module) -> set[str]:
    return {row.name for row in dq.plan(model).converted if (row.settings.w_bits, row.settings.a_bits) == (BITS, BITS)}


def _written_out(layer: type[nn.Module]) -> Callable[[nn.Module, Task], nn.Module]:
    def convert(model: nn.Module, task: Task) -> nn.Module:
        seen: dict[str, Tensor] = {}
        with torch.no_grad(), inputs_seen(model, task.names, seen.__setitem__):
            model(task.x)
        made = {name: layer(model.get_submodule(name), signed, seen[name]) for name, signed in task.signed.items()}
        return replaced(model, made)

    return convert


def _instances(*classes: type[nn.Module]) -> Callable[[nn.Module], set[str]]:
    return lambda model: {name for name, module in model.named_modules() if isinstance(module, classes)}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("float", "float", "torch", lambda model, task: model, lambda model: set()),
        Contender(
            "daqconvert", "ours", "daqconvert",
            lambda model, task: _ours(model, task, w_bits=BITS, a_bits=BITS, first=None, last=None), _ours_quantized,
        ),
        Contender(
            "daqconvert-paper", "ours", "daqconvert",
            lambda model, task: _ours(model, task, preset=f"paper-w{BITS}a{BITS}"), _ours_quantized,
        ),
        Contender("lsq", "peer", "torch", _written_out(Lsq), _instances(Lsq)),
        Contender("brevitas", "peer", "brevitas", qat_peers.brevitas, qat_peers.quantized_by_brevitas),
        Contender("torchao", "peer", "torchao", qat_peers.torchao, _instances(qat_peers.TorchaoLayer)),
        Contender(
            "torchao-learned", "peer", "torchao",
            lambda model, task: qat_peers.torchao(model, task, learned=True), _instances(qat_peers.TorchaoLayer),
        ),
        Contender("reference", "reference", "daqconvert", _written_out(Reference), _instances(Reference)),
    )
}  # fmt: skip


class Refused(Exception):
    """A contender cannot take part; the message says why."""


class Trainee:
    """A contender's network with its optimizer.

    Args:
        contender: Which one.
        task: Network and batch.
        compiled: Whether the forward and backward run under `torch.compile`.

    Raises:
        Refused: If the package is missing, or the contender quantizes other layers than the plan.
    """

    def __init__(self, contender: Contender, task: Task, compiled: bool) -> None:
        if not contender.installed:
            raise Refused("not installed")
        expected = set() if contender.group == "float" else set(task.names)
        self.model = contender.convert(copy.deepcopy(task.model), task).train()
        found = contender.quantized(self.model)
        if found != expected:
            raise Refused(f"quantizes other layers: {len(found)}, of these {len(found & expected)} of {len(expected)}")
        self.x, self.y = task.x, task.y
        self.forward = _compiled(self.model, contender.name) if compiled else self.model
        known = {name for name, _ in task.model.named_parameters()}
        weights = [p for name, p in self.model.named_parameters() if name in known]
        others = [p for name, p in self.model.named_parameters() if name not in known and p.requires_grad]
        if len(weights) != len(known):
            raise Refused(f"{len(known) - len(weights)} of {len(known)} parameters of the float network are missing")
        groups: list[dict[str, Any]] = [{"params": weights}]
        if others:
            groups.append({"params": others, "lr": QUANTIZER_LR * task.network.lr})
        self.optimizer = torch.optim.SGD(groups, lr=task.network.lr, momentum=MOMENTUM)

    def step(self) -> Tensor:
        """Make one training step and return its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _compiled(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """Return the compiled network.

    Its outermost function has a code object of its own: dynamo files compiled code by code object, and contenders that
    share `ResNet.forward` would check each other's guards at every call.
    """

    def run(x: Tensor) -> Tensor:
        return model(x)

    code = run.__code__.replace(co_name="run_" + name.replace("-", "_"))
    return torch.compile(types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__))


def told(error: BaseException) -> str:
    """Return an error as one line; for `Refused` only the reason."""
    return common.told(str(error) if isinstance(error, Refused) else error)
