"""Watches a running model and records every product with a weight operand, and every product of activations.

Values are followed from operator to operator (`provenance`), so the counts are of products that really ran, not of
layers that a model has. The hooks are torch's global ones, because hooks on a module would switch off fused kernels;
they are removed afterwards.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from daqconvert.layers.registry import is_site_type
from daqconvert.macs.operators import Product, products_of
from daqconvert.macs.provenance import Origin, Provenance, tensors_in
from daqconvert.quantizers.base import Quantizer
from daqconvert.spec import Settings

UNOWNED = "(a parameter that the model does not own)"
"""Stands for the name of a parameter that no module of the model has registered."""


@dataclass(frozen=True)
class Event:
    """One product that ran.

    Attributes:
        op: Name of the operator, such as `"addmm"`.
        module: Dotted name of the innermost module that was running.
        macs: Multiply-accumulates.
        tensors: Names of the parameters and buffers that the weight operand is computed from, aliases included.
        attention: Whether both operands are activations.
        x_quantized: Whether a quantizer returned the input (in an attention product: the first operand).
        w_quantized: Whether a quantizer returned the weight (in an attention product: the second operand).
        learned: Whether a parameter is among `tensors`, so that the weight is not a fixed filter.
        of_data: Whether the input depends on the model's inputs; False for a product of two parameters.
        where: File and line of the code that called the operator, such as `"model.py:12"`.
    """

    op: str
    module: str
    macs: int
    tensors: tuple[str, ...] = ()
    attention: bool = False
    x_quantized: bool = False
    w_quantized: bool = False
    learned: bool = field(default=False, compare=False)
    of_data: bool = field(default=False, compare=False)
    where: str = field(default="", compare=False)


class Counter(TorchDispatchMode):
    """The dispatch mode that sees every operator and counts its products.

    Attributes:
        events: The products that ran so far, in order of execution.
    """

    def __init__(self, paths: dict[int, str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._paths = paths
        self._running: list[str] = []
        self._provenance = Provenance()
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._weights: set[str] = set()
        self._parameters: set[str] = {UNOWNED}

    def know(self, named: Iterable[tuple[str, Tensor, bool]], inputs: Any) -> None:
        """Tell the counter which tensors are parameters and buffers, and which are the model's inputs.

        Each item of `named` is a dotted name, a tensor, and whether the tensor may be a weight.
        """
        for name, tensor, weight in named:
            first = next(iter(self._provenance.of(tensor).tensors), name)
            self._aliases[first] = (*self._aliases.get(first, ()), name)
            self._provenance.set(tensor, Origin(tensors=frozenset([first])))
            if weight and tensor.dim() > 0:
                self._weights.add(first)
                self._parameters.add(first)
        for tensor in tensors_in(inputs, deep=True):
            self._provenance.set(tensor, Origin(data=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator, and record what it multiplies and where its result comes from."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func.namespace == "aten":  # in torch.inference_mode composites such as aten::linear are not decomposed yet
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        for tensor in tensors_in((args, kwargs)):
            if isinstance(tensor, nn.Parameter) and not self._provenance.knows(tensor):
                self.know([(UNOWNED, tensor, True)], ())
        out = func(*args, **kwargs)
        name = func._schema.name
        for product in products_of(name, args, kwargs, out):
            self._note(name.partition("::")[2], product)
        self._provenance.follow(func, args, kwargs, out)
        return out

    def _note(self, op: str, product: Product) -> None:
        x, w = self._provenance.of(product.x), self._provenance.of(product.w)
        role = product.role
        if role == "matrix":
            weights = [operand for operand in (w, x) if not operand.data and operand.tensors & self._weights]
            if weights:
                w, x = (w, x) if min(weights, key=lambda operand: len(operand.tensors)) is w else (x, w)
                role = "weight"
            elif x.data and w.data:
                role = "attention"
            else:
                return  # a product with a constant
        here = self._running[-1] if self._running else ""
        if role == "attention":
            self.events.append(Event(op, here, product.macs, (), True, x.quantized, w.quantized))
            return
        names = dict.fromkeys(alias for name in sorted(w.tensors) for alias in self._aliases.get(name, ()))
        learned = not w.tensors.isdisjoint(self._parameters)
        followed = (
            isinstance(product.x, Tensor) and product.x.layout is torch.strided
        )  # sparse tensors are not followed
        of_data = x.data or not followed
        event = Event(
            op, here, product.macs, tuple(names), False, x.quantized, w.quantized, learned, of_data, _caller()
        )
        self.events.append(event)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Record which module runs (a forward pre-hook)."""
        path = self._paths.get(id(module))
        if path is not None:
            self._running.append(path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record that a module is done, and mark the output of a quantizer or a layer (a forward hook)."""
        path = self._paths.get(id(module))
        if path is not None and path in self._running:
            while self._running.pop() != path:
                pass
        if isinstance(module, Quantizer):
            self._provenance.mark(output, given=args, quantized=True)
        elif is_site_type(module):
            self._provenance.mark(output, data=True)

    def returned(self, method: Any) -> Any:
        """Wrap a method of a frozen layer that returns an operand, so that the operand is marked as quantized."""

        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            operand = method(*args, **kwargs)
            self._provenance.mark(operand, given=(args, kwargs), quantized=True)
            return operand

        return wrapper


def _caller() -> str:
    """Return file and line of the innermost code that is neither torch's nor daqconvert's, such as `"model.py:12"`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path, owner = Path(frame.f_code.co_filename), str(frame.f_globals.get("__name__", ""))
        if not f"{owner}.".startswith(("torch.", "daqconvert.")):
            return f"{path.name}:{frame.f_lineno}" if path.suffix else path.name.strip("<>")
        frame = frame.f_back
    return ""


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Run compiled modules uncompiled, because operators inside a compiled graph cannot be seen."""
    compiled = any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())  # here it is harmless that hooks also fire for the wrapper
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
        yield


@contextmanager
def counting(model: nn.Module, inputs: Any, state: Mapping[int, Tensor] | None = None) -> Iterator[Counter]:
    """Count what runs while the context lasts.

    Args:
        model: Any module.
        inputs: The arguments that the model will be called with.
        state: `id` of a parameter or buffer -> the tensor that replaces it while the model runs.

    Yields:
        The counter; its `events` grow as the model runs.
    """
    paths = {id(module): _without_compile(name) for name, module in model.named_modules()}
    counter = Counter(paths)
    counter.know(_named(model, state or {}), inputs)
    with ExitStack() as stack:
        before = torch_module.register_module_forward_pre_hook(counter.enter)
        stack.callback(before.remove)
        after = torch_module.register_module_forward_hook(counter.leave, always_call=True)
        stack.callback(after.remove)
        for module in model.modules():
            for method in ("input_operand", "weight_operand"):
                if isinstance(getattr(module, "settings", None), Settings) and hasattr(type(module), method):
                    module.__dict__[method] = counter.returned(getattr(module, method))
                    stack.callback(module.__dict__.pop, method)
        stack.enter_context(counter)
        yield counter


def _without_compile(name: str) -> str:
    """Return a dotted name without the `_orig_mod` that `torch.compile` inserts."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def _named(model: nn.Module, state: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, UninitializedParameter):
            yield _without_compile(name), state.get(id(parameter), parameter), True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not isinstance(buffer, UninitializedBuffer):
            yield _without_compile(name), state.get(id(buffer), buffer), name.endswith("weight_codes")
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):  # a weight that weight_norm or pruning computed
                yield _without_compile(f"{path}.{key}".lstrip(".")), value, key == "weight" or value.requires_grad
