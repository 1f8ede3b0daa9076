"""Which values of an fx graph are proven non-negative: outputs of ReLU and similar functions, and values made of them.

Only functions and modules of torch, timm and torchvision count as proof: a user's class or function of the same name
proves nothing, and neither does a module whose output a hook may change.

A proof holds for tensors of real floating-point numbers, which is what a site multiplies. Integers wrap around
(`abs` of the int8 -128 is -128), and a complex number has no sign. Therefore each proof also says for which types it
holds (`FOR_FLOATS`, `FOR_REALS`, `FOR_ALL`): one for floats does not outlive a conversion, as in `x.abs().float()`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from daqconvert.graph.calls import is_shape

NONNEGATIVE_MODULES = {"ReLU", "Sigmoid", "Hardsigmoid", "HardSigmoid", "Softmax", "Softmax2d"}
KEEPING_MODULES = {
    *(f"{kind}Pool{d}d" for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Identity", "Flatten", "Unflatten", "ZeroPad1d", "ZeroPad2d"),
    *("ReflectionPad1d", "ReflectionPad2d", "ReplicationPad1d", "ReplicationPad2d", "PixelShuffle", "ChannelShuffle"),
    *("UpsamplingNearest2d", "UpsamplingBilinear2d", "AvgPool2dSame", "MaxPool2dSame", "DropPath", "PixelUnshuffle"),
}
WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)
"""Hooks that compute a weight before a layer's forward and leave its input alone."""
NONNEGATIVE_CALLS = {"relu", "relu_", "relu6", "softmax", "hardsigmoid", "softplus"}
FLOAT_CALLS = {"abs", "square"}
"""Functions whose value is non-negative, if it is real and floating."""
REAL_CALLS = {"sigmoid", "sigmoid_", "exp"}
"""Functions whose value is non-negative, if it is real; of integers they make floating values."""
MOVING_CALLS = {
    *("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "dropout", "chunk"),
    *("getitem", "split", "unbind", "expand", "repeat", "clone", "detach", "roll", "flip", "narrow", "dropout_"),
    *("feature_dropout", "channel_shuffle", "pixel_shuffle", "expand_as", "select", "unfold", "amax"),
    *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
}
SUMMING_CALLS = {"mean", "sum", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "sqrt"}
"""Functions that keep the sign of floating values; sums of integers may wrap around."""
POOLS = {f"{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)}
CASTS = {"to", "float", "double", "half", "bfloat16"}
JOINING = {"cat", "concat", "stack"}
WRAPPING = {"add", "add_", "iadd", "mul", "mul_", "imul"}
ALL_OPERANDS = JOINING | WRAPPING | {"maximum", "minimum", "max"}
CLIPS = {f"{name}{end}" for name in ("clamp", "clip", "hardtanh", "clamp_min", "clamp_max") for end in ("", "_")}
RESIZING = {"nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area"}
"""Modes of `interpolate` whose weights are all non-negative."""
SAME_TYPE = MOVING_CALLS | SUMMING_CALLS - {"sqrt"} | POOLS | ALL_OPERANDS | CLIPS | {
    *("relu", "relu_", "relu6", "softmax", "abs", "square", "pad", "interpolate"),
}  # fmt: skip
"""Functions whose result is real and floating exactly if their operands, all of one type, are."""
FLOATING_CALLS = SAME_TYPE | REAL_CALLS | {
    *("softplus", "hardsigmoid", "sqrt", "sub", "sub_", "isub", "rsub", "truediv", "div", "div_", "neg", "pow"),
    *("tanh", "gelu", "silu", "hardswish", "leaky_relu", "elu", "mish", "log_softmax", "logsigmoid", "normalize"),
    *("layer_norm", "batch_norm", "group_norm", "instance_norm", "linear", "matmul", "bmm", "einsum", "var", "std"),
    *(f"conv{d}d" for d in (1, 2, 3)), *(f"conv_transpose{d}d" for d in (1, 2, 3)), "scaled_dot_product_attention",
}  # fmt: skip
"""Functions whose result is real and floating if all of their operands are."""
MODULES_OF_TORCH = {
    *("torch", "torch.functional", "torch.nn.functional", "torch._jit_internal", "torch._C", "torch._C._nn"),
    *("torch._tensor", "_operator", "builtins"),
}
FLOATING = "floating"
FOR_FLOATS, FOR_REALS, FOR_ALL = 1, 2, 3
"""What a proof holds for: real floating-point values; integers too; complex numbers too."""


def nonnegative_nodes(
    graph: fx.Graph, modules: dict[str, nn.Module], hooked: frozenset[str] = frozenset()
) -> set[fx.Node]:
    """Return the nodes of a graph whose value is proven non-negative, if it is real and floating.

    The graph has to be traced in evaluation mode; `trace.in_sequence` must have been applied to it, so that a call
    that changes a tensor in place stands for the changed tensor in all later calls. `hooked` are the names of modules
    whose inputs or outputs hooks may change (`is_hooked`); nothing is proven if one of them is no node of the graph.
    """
    signs = _Signs(modules, hooked)
    if hooked - {str(node.target) for node in graph.nodes if node.op == "call_module"} - {""}:
        return set()
    for node in graph.nodes:
        signs.add(node)
    return set(signs.proven)


class _Signs:
    """What is proven of the nodes of a graph, which are added in order.

    Attributes:
        proven: Node proven non-negative -> what the proof holds for.
        kinds: Node -> `FLOATING` if its value is known to be real and floating; else a node whose value is real and
            floating exactly if this one is, possibly the node itself.
    """

    def __init__(self, modules: dict[str, nn.Module], hooked: frozenset[str]) -> None:
        self.modules, self.hooked = modules, hooked
        self.proven: dict[Any, int] = {}
        self.kinds: dict[fx.Node, Any] = {}
        self._numbers: set[fx.Node] = set()

    def add(self, node: fx.Node) -> None:
        if is_number(node, self._numbers):
            self._numbers.add(node)
        operands = [n for n in node.all_input_nodes if n not in self._numbers]
        kinds = {self.kinds[operand] for operand in operands}
        self.kinds[node] = self._kind(node, kinds.pop() if len(kinds) == 1 else node)
        proof: int | None = None
        if node.op == "call_module" and node.target not in self.hooked:
            proof = self._module(self.modules[str(node.target)], first_operand(node))
        elif node.op in ("call_function", "call_method"):
            proof = self._call(node, torch_name(node), first_operand(node))
        if proof is not None:
            self.proven[node] = FOR_ALL if self.kinds[node] is FLOATING else proof

    def _kind(self, node: fx.Node, same: Any) -> Any:
        """Return the kind of a node; `same` is that of its operands, or the node itself if they differ."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return FLOATING if _is_real(getattr(self.modules.get(owner), name, None)) else node
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            known = library_type(module)
            real = any(map(_is_real, (*module.parameters(), *module.buffers())))
            return FLOATING if known and (real or same is FLOATING) else same if known in KEEPING_MODULES else node
        name = torch_name(node) if node.op != "placeholder" else ""
        if name in CASTS:
            target = self._target(node)
            return same if target is None else target
        typed = node.kwargs.get("dtype")
        if not name or typed is not None:
            return FLOATING if name and _is_real(typed) else node
        if same is FLOATING:
            return FLOATING if name in FLOATING_CALLS else node
        whole = not any(isinstance(value, (float, complex)) for value in tree_leaves((node.args, dict(node.kwargs))))
        return same if name in SAME_TYPE and whole else node

    def _target(self, node: fx.Node) -> Any:
        """Return the kind that `x.to(...)` or `x.float()` asks for; None if it does not change the type."""
        if node.target in CASTS - {"to"}:
            return FLOATING
        for value in (*node.args[1:], *node.kwargs.values()):
            if isinstance(value, torch.dtype):
                return FLOATING if _is_real(value) else node
            if isinstance(value, fx.Node) and not _is_attribute(value, "device"):
                like: Any = value.args[0] if _is_attribute(value, "dtype") else value
                return self.kinds[like]
        return None

    def _module(self, module: Any, first: fx.Node | None) -> int | None:
        """Return what `_call` returns, for the call of a module."""
        kind = library_type(module)
        if _gives_nonnegative(module):
            return FOR_REALS if kind == "Sigmoid" else FOR_ALL
        if first not in self.proven:
            return None
        if kind == "Upsample":
            return FOR_FLOATS if module.mode in RESIZING else None
        if kind not in KEEPING_MODULES or not _pool_keeps_sign(vars(module), kind.endswith("Same")):
            return None
        return FOR_FLOATS if "Avg" in kind else self.proven[first]

    def _call(self, node: fx.Node, name: str, first: fx.Node | None) -> int | None:
        """Return what the proof of a call's sign holds for; None if its sign is not proven."""
        converts = node.kwargs.get("dtype") is not None and name != "softmax"
        if converts and self.proven.get(first) != FOR_ALL:
            return None  # the operand is converted first
        arguments = argument(node, 1, "beta", 1), argument(node, 2, "threshold", 20)
        if name == "softplus" and not _softplus_is_positive(*arguments):
            return None
        if name in NONNEGATIVE_CALLS:
            return FOR_ALL
        if name in FLOAT_CALLS | REAL_CALLS:
            return FOR_REALS if name in REAL_CALLS else FOR_FLOATS
        if name in ALL_OPERANDS:
            return self._of_operands(node, name)
        if name in CLIPS:
            limits = clip_limits(node)
            proven = limits is not None and limits[1] >= 0 and (limits[0] >= 0 or first in self.proven)
            return (FOR_ALL if limits[0] >= 0 else self.proven[first]) if proven and limits is not None else None
        return self._of_first(node, name, first) if first in self.proven else None

    def _of_first(self, node: fx.Node, name: str, first: Any) -> int | None:
        """Return what `_call` returns, for functions of one tensor, which is proven non-negative."""
        if name in MOVING_CALLS:
            return None if _reinterprets(node) else self.proven[first]
        if name in POOLS:
            is_max = name.startswith("max")
            places = {"padding": 3, "dilation": 4} if is_max else {"divisor_override": 6}
            kept = _pool_keeps_sign({key: argument(node, place, key, None) for key, place in places.items()})
            return (self.proven[first] if is_max else FOR_FLOATS) if kept else None
        if name == "interpolate":
            return FOR_FLOATS if argument(node, 3, "mode", "nearest") in RESIZING else None
        if name == "pad":
            value = argument(node, 3, "value", 0)
            return FOR_FLOATS if value is None or (isinstance(value, (int, float)) and value >= 0) else None
        if name in CASTS and self._target(node) is not None:
            return FOR_FLOATS if self.proven[first] == FOR_ALL else None
        if name in CASTS:
            return self.proven[first]
        return FOR_FLOATS if name in SUMMING_CALLS else None

    def _of_operands(self, node: fx.Node, name: str) -> int | None:
        """Return what `_call` returns, for functions of several tensors (`cat` takes a list of them) and numbers."""
        flat: list[Any] = []
        for arg in (*node.args, *node.kwargs.values()):  # keywords too: `torch.add(x, y, alpha=-1)` subtracts
            flat.extend(arg if isinstance(arg, (list, tuple)) else [arg])
        nodes = [a for a in flat if isinstance(a, fx.Node)]
        numbers = [a for a in flat if not isinstance(a, fx.Node) and a is not None and name not in JOINING]
        if not all(isinstance(a, (int, float)) and a >= 0 for a in numbers) or not nodes:
            return None
        if any(a not in self.proven for a in nodes):
            return None
        proof = min(self.proven[a] for a in nodes)
        converted = any(self.kinds[a] is not self.kinds[node] for a in nodes)  # an integer may become a float here
        if converted and proof < FOR_REALS:
            return None
        return FOR_FLOATS if name in WRAPPING else proof


def torch_name(node: fx.Node) -> str:
    """Return the name of a method, or of a function of torch or Python; empty for a user's function."""
    if node.op == "call_method":
        return str(node.target)
    target: Any = node.target
    module = getattr(target, "__module__", None) or "torch"  # torch's own builtins have none
    return str(getattr(target, "__name__", "")) if module in MODULES_OF_TORCH else ""


def first_operand(node: fx.Node) -> fx.Node | None:
    """Return the tensor that a call computes from, if it is its first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return first if isinstance(first, fx.Node) else None


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """Return an argument of a call, given by position or by keyword."""
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def is_number(node: fx.Node, known: set[fx.Node]) -> bool:
    """Return whether a node is no tensor: the size or type of one, or computed from sizes alone.

    `known` are the numbers among the nodes before it: nodes are asked in order, so that no depth is too deep.
    """
    inputs = node.all_input_nodes
    return is_shape(node) or (bool(inputs) and known.issuperset(inputs))


def library_type(module: nn.Module) -> str:
    """Return the class name of a module of torch, timm or torchvision; empty for a user's class."""
    return type(module).__name__ if type(module).__module__.split(".")[0] in ("torch", "timm", "torchvision") else ""


def is_hooked(module: nn.Module) -> bool:
    """Return whether a hook, or a forward of the object's own, may change what a module gets or returns."""
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, WEIGHT_HOOKS)]
    return "forward" in vars(module) or bool(before or module._forward_hooks)


def clip_limits(node: fx.Node) -> tuple[float, float] | None:
    """Return the limits that a call of one of `CLIPS` clips to; None if one of them is no number that is known now.

    A missing limit is infinite. Where both are given and cross, torch returns the upper one everywhere.
    """
    name = torch_name(node).removesuffix("_")
    tanh = name == "hardtanh"
    lower, upper = argument(node, 1, "min_val" if tanh else "min", -1.0 if tanh else None), None
    if name == "clamp_max":
        lower, upper = None, argument(node, 1, "max", None)
    elif name != "clamp_min":
        upper = argument(node, 2, "max_val" if tanh else "max", 1.0 if tanh else None)
    low, high = (-math.inf if lower is None else lower), (math.inf if upper is None else upper)
    if not all(isinstance(end, (int, float)) and not math.isnan(end) for end in (low, high)):
        return None
    return min(float(low), float(high)), float(high)


def _gives_nonnegative(module: Any) -> bool:
    """Whether a module's outputs are non-negative whatever its inputs, with the arguments that it has now."""
    kind = library_type(module)
    if kind == "Softplus":
        return _softplus_is_positive(module.beta, module.threshold)
    if kind in ("Hardtanh", "ReLU6"):
        return bool(min(module.min_val, module.max_val) >= 0)
    act = getattr(module, "act", None)
    if "NormAct" in kind and isinstance(act, nn.Module):  # timm's norms with a built-in activation
        return _gives_nonnegative(act)
    return kind in NONNEGATIVE_MODULES


def _softplus_is_positive(beta: Any, threshold: Any) -> bool:
    """Whether `softplus` is non-negative: above the threshold it returns its input unchanged."""
    return all(isinstance(n, (int, float)) for n in (beta, threshold)) and beta > 0 and threshold >= 0


def _pool_keeps_sign(arguments: dict[str, Any], padded: bool = False) -> bool:
    """Whether a pool gives a non-negative output for every non-negative input.

    A divisor can be negative, and the window of a dilated maximum can lie in the padding alone, which is `-inf`.
    """
    divisor = arguments.get("divisor_override")
    dilation, padding = (tree_leaves(arguments.get(key)) for key in ("dilation", "padding"))
    whole = all(n in (None, 1) for n in dilation) or (not padded and all(n in (None, 0) for n in padding))
    return bool(whole and (divisor is None or (isinstance(divisor, int) and int(divisor) > 0)))


def _reinterprets(node: fx.Node) -> bool:
    """Whether a call is `x.view(dtype)`, which reads the bits of a tensor as another type."""
    leaves = tree_leaves((node.args[1:], dict(node.kwargs)))
    return any(isinstance(leaf, torch.dtype) or _is_attribute(leaf, "dtype") for leaf in leaves)


def _is_attribute(value: Any, name: str) -> bool:
    return isinstance(value, fx.Node) and value.target is getattr and str(value.args[1]) == name


def _is_real(value: Any) -> bool:
    """Whether a dtype, or the dtype of a tensor, is that of real floating-point numbers."""
    dtype = value.dtype if isinstance(value, Tensor) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
