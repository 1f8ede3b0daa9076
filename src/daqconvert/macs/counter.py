"""Watches a model run and notes every product with a weight operand, and every product of activations.

Values are followed from operator to operator (`provenance`), so what counts is what ran, not what a model has.
Hooks are global ones and gone afterwards: hooks of a module's own would switch off torch's fused kernels.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Event:
    """One product that ran.

    Attributes:
        op: Name of the operator, as `"addmm"`.
        module: Dotted name of the innermost module that was running.
        macs: Multiply-accumulates.
        tensors: Names of the parameters and buffers behind the weight operand, aliases included.
        attention: Whether both operands are activations.
        x_quantized: Whether the input (the first operand of an attention product) is what a quantizer returned.
        w_quantized: Whether the weight (the second operand) is.
    """

    op: str
    module: str
    macs: int
    tensors: tuple[str, ...] = ()
    attention: bool = False
    x_quantized: bool = False
    w_quantized: bool = False

    def site(self, sites: Collection[str], tensors: Mapping[str, str], modules: Mapping[str, str]) -> str | None:
        """Return the name of the site that this product belongs to, or None.

        Args:
            sites: Names of all sites.
            tensors: Parameter or buffer -> site, for sites that are not the module which holds their weight.
            modules: Module -> site, for weights that depend on the model's inputs.
        """
        found = [tensors[name] for name in self.tensors if name in tensors]
        found += [name for name in self.tensors if name in sites]  # a site that is named after its bare parameter
        found += [owner for owner in map(owner_of, self.tensors) if owner in sites]
        if not self.tensors:
            found = [modules[self.module]] if self.module in modules else []
        here = modules.get(self.module, self.module)
        return here if here in found else next(iter(found), None)


def owner_of(tensor: str) -> str:
    """Return the module that a parameter belongs to, the parametrized one where it is an original.

    Example:
        >>> owner_of("a.b.weight"), owner_of("a.parametrizations.weight.original0")
        ('a.b', 'a')
    """
    parts = tensor.split(".")
    return ".".join(parts[: parts.index("parametrizations") if "parametrizations" in parts else -1])


class Counter(TorchDispatchMode):
    """The mode that sees every operator.

    Attributes:
        events: Products in order of execution.
    """

    def __init__(self, paths: dict[int, str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._paths = paths
        self._running: list[str] = []
        self._sources = Provenance()
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._weights: set[str] = set()

    def know(self, named: Iterable[tuple[str, Tensor, bool]], inputs: Any) -> None:
        """Say what is a parameter or a buffer, and what is data.

        Args:
            named: Dotted name, tensor, and whether it is a weight where it has two dimensions or more.
            inputs: The model's, nested as they come.
        """
        for name, tensor, weight in named:
            origin = next(iter(self._sources.of(tensor).origins), name)
            self._aliases[origin] = (*self._aliases.get(origin, ()), name)
            self._sources.set(tensor, Origin(origins=frozenset([origin])))
            if weight and tensor.dim() > 1:
                self._weights.add(origin)
        for tensor in tensors_in(inputs, deep=True):
            self._sources.set(tensor, Origin(data=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operator, note what it multiplies, and where its values come from."""
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if func.namespace == "aten":  # torch.inference_mode sends composites such as aten::linear here whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        name = func._schema.name
        for product in products_of(name, args, kwargs, out):
            self._note(name.partition("::")[2], product)
        self._sources.follow(func, args, kwargs, out)
        return out

    def _note(self, op: str, product: Product) -> None:
        x, w = self._sources.of(product.x), self._sources.of(product.w)
        role = product.role
        if role == "matrix":
            weights = [s for s in (w, x) if not s.data and s.origins & self._weights]
            if weights:
                w, x = (w, x) if min(weights, key=lambda s: len(s.origins)) is w else (x, w)
                role = "weight"
            elif x.data and w.data:
                role = "attention"
            else:
                return  # a product with a constant
        names = tuple(alias for origin in sorted(w.origins) for alias in self._aliases.get(origin, ()))
        here = self._running[-1] if self._running else ""
        attention = role == "attention"
        tensors = () if attention else names
        self.events.append(Event(op, here, product.macs, tensors, attention, x.quantized, w.quantized))

    def enter(self, module: nn.Module, args: Any) -> None:
        """Note which module runs (a forward pre-hook)."""
        path = self._paths.get(id(module))
        if path is not None:
            self._running.append(path)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that it is done, and what a quantizer or a layer returned (a forward hook)."""
        path = self._paths.get(id(module))
        if path is not None and path in self._running:
            while self._running.pop() != path:
                pass
        if isinstance(module, Quantizer):
            self._sources.mark(output, given=args, quantized=True)
        elif is_site_type(module):
            self._sources.mark(output, data=True)

    def returned(self, method: Any) -> Any:
        """Wrap a method of a frozen layer that returns an operand."""

        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            operand = method(*args, **kwargs)
            self._sources.mark(operand, given=(args, kwargs), quantized=True)
            return operand

        return wrapper


@contextmanager
def counting(model: nn.Module, inputs: Any, state: Mapping[int, Tensor] | None = None) -> Iterator[Counter]:
    """Count what runs while the context lasts.

    Args:
        model: Any module.
        inputs: What it will be called with.
        state: What takes the place of a parameter or buffer while it runs, by the id of that.

    Yields:
        The counter; its `events` grow as the model runs.
    """
    paths = {id(module): plain(name) for name, module in model.named_modules()}
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


def plain(name: str) -> str:
    """Return a dotted name without what `torch.compile` puts between."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def totals(events: Iterable[Event], name: Any) -> Tally[str]:
    """Return MACs by `name(event)`; events without a name do not count."""
    found: Tally[str] = Tally()
    for event in events:
        key = name(event)
        if key is not None:
            found[key] += event.macs
    return found


def _named(model: nn.Module, state: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, UninitializedParameter):
            yield plain(name), state.get(id(parameter), parameter), True
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not isinstance(buffer, UninitializedBuffer):
            yield plain(name), state.get(id(buffer), buffer), name.endswith("weight_codes")
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):  # the weight that the old weight_norm and pruning leave behind
                yield plain(f"{path}.{key}".lstrip(".")), value, key == "weight" or value.requires_grad
