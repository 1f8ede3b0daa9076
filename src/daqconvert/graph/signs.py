"""Which values of an fx graph are proven non-negative: outputs of ReLU and similar functions, and values made of them.

Only functions and modules of torch, timm and torchvision count as proof: a user's class or function of the same name
proves nothing.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx, nn

NONNEGATIVE_MODULES = {"ReLU", "ReLU6", "Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax", "Softmax2d", "Softplus"}
KEEPING_MODULES = {
    *(f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Identity", "Flatten", "Unflatten", "ZeroPad1d", "ZeroPad2d"),
    *("ReflectionPad1d", "ReflectionPad2d", "ReplicationPad1d", "ReplicationPad2d", "PixelShuffle", "ChannelShuffle"),
    *("UpsamplingNearest2d", "UpsamplingBilinear2d", "AvgPool2dSame", "MaxPool2dSame", "DropPath", "PixelUnshuffle"),
}
NONNEGATIVE_CALLS = {"relu", "relu_", "relu6", "sigmoid", "sigmoid_", "softmax", "hardsigmoid", "softplus", "abs"}
NONNEGATIVE_CALLS |= {"square", "exp"}
KEEPING_CALLS = {
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "boolean_dispatch", "mean", "amax", "sum"),
    *("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "dropout", "chunk"),
    *("getitem", "split", "unbind", "expand", "repeat", "clone", "detach", "roll", "flip", "to", "float", "narrow"),
    *("dropout_", "feature_dropout", "channel_shuffle", "pixel_shuffle", "sqrt", "expand_as", "select", "unfold"),
}
ALL_OPERANDS = {"cat", "concat", "stack", "add", "add_", "iadd", "mul", "mul_", "imul", "maximum", "minimum", "max"}
BOUNDED_BELOW = {"clamp", "clamp_", "clip", "hardtanh"}


def nonnegative_nodes(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Return the nodes of a graph, traced in evaluation mode, whose value is proven non-negative."""
    proven: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_nonnegative(node, modules, proven):
            proven.add(node)
        elif _is_in_place(node):
            # `x.sub_(1)` changes the value of `x` for later calls, and of every tensor that `x` is a view of
            changed = node.args[0] if node.args else None
            while isinstance(changed, fx.Node) and changed in proven:
                proven.discard(changed)
                changed = changed.args[0] if changed.args else None
    return proven


def _is_nonnegative(node: fx.Node, modules: dict[str, nn.Module], proven: set[fx.Node]) -> bool:
    first = node.args[0] if node.args else None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if library_type(module) in NONNEGATIVE_MODULES or _activation_is_nonnegative(module):
            return True
        if isinstance(module, nn.Upsample):
            return first in proven and module.mode != "bicubic"
        if isinstance(module, nn.Hardtanh):
            return module.min_val >= 0
        return library_type(module) in KEEPING_MODULES and first in proven
    if node.op not in ("call_function", "call_method"):
        return False
    name = _call_name(node)
    if name in NONNEGATIVE_CALLS:
        return True
    if name in KEEPING_CALLS:
        return first in proven
    if name in ALL_OPERANDS:
        return _all_proven(node, proven)
    if name in ("interpolate", "pad"):
        return first in proven and _keeps_sign(name, node)
    if name in BOUNDED_BELOW:
        return limit(node, "min") >= 0 or (first in proven and limit(node, "max") >= 0)
    return False


def _call_name(node: fx.Node) -> str:
    """Return the name of a method, or of a function of torch or Python; empty for a user's function."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    module = getattr(target, "__module__", None) or "torch"  # torch's own builtins have none
    if module.split(".")[0] not in ("torch", "_operator", "builtins", "math"):
        return ""
    return str(getattr(target, "__name__", ""))


def _is_in_place(node: fx.Node) -> bool:
    """Whether a call may write into its first argument."""
    if node.op == "call_function" and bool(node.kwargs.get("inplace")):
        return True
    name = _call_name(node) if node.op in ("call_function", "call_method") else ""
    in_place_operator = node.op == "call_function" and getattr(operator, name, None) is node.target and name[:1] == "i"
    return (name.endswith("_") and not name.endswith("__")) or in_place_operator or name == "setitem"


def library_type(module: nn.Module) -> str:
    """Return the class name of a module of torch, timm or torchvision; empty for a user's class."""
    return type(module).__name__ if type(module).__module__.split(".")[0] in ("torch", "timm", "torchvision") else ""


def _activation_is_nonnegative(module: nn.Module) -> bool:
    """Whether a module is one of timm's norms with a built-in activation whose outputs are non-negative."""
    act = getattr(module, "act", None)
    if "NormAct" not in library_type(module) or not isinstance(act, nn.Module):
        return False
    return library_type(act) in NONNEGATIVE_MODULES


def _all_proven(node: fx.Node, proven: set[fx.Node]) -> bool:
    """Whether every tensor operand (for `cat`, every one in the list) is proven and every number is non-negative."""
    flat: list[Any] = []
    for arg in (*node.args, *node.kwargs.values()):  # keywords too: `torch.add(x, y, alpha=-1)` subtracts
        flat.extend(arg if isinstance(arg, (list, tuple)) else [arg])
    name = _call_name(node)
    operands = flat if name not in ("cat", "concat", "stack") else [a for a in flat if isinstance(a, fx.Node)]
    numbers_ok = all(a >= 0 for a in operands if isinstance(a, (int, float)))
    nodes = [a for a in operands if isinstance(a, fx.Node)]
    return bool(nodes) and numbers_ok and all(a in proven for a in nodes)


def _keeps_sign(name: str, node: fx.Node) -> bool:
    if name == "interpolate":
        mode = node.kwargs.get("mode", node.args[3] if len(node.args) > 3 else "nearest")
        return bool(mode != "bicubic")
    value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 0)
    return value is None or (isinstance(value, (int, float)) and value >= 0)


def limit(node: fx.Node, end: str) -> float:
    """Return the limit `end`, `"min"` or `"max"`, of a call of `clamp`, `clip` or `hardtanh`; infinity if it has none.

    A limit that is not a number, such as a tensor, counts as `-inf`: it proves nothing.
    """
    key = f"{end}_val" if _call_name(node) == "hardtanh" else end
    place = 1 if end == "min" else 2
    value = node.kwargs.get(key, node.args[place] if len(node.args) > place else None)
    if value is None and _call_name(node) == "hardtanh":
        value = -1.0 if end == "min" else 1.0
    if value is None:
        return -math.inf if end == "min" else math.inf
    return float(value) if isinstance(value, (int, float)) else -math.inf
