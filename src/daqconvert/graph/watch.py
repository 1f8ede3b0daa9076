"""Watching a real forward for products that the plan does not know, and for weights used without calling their layer.

A trace finds `F.linear(x, self.qkv.weight)` only if fx can follow the code; a real forward shows every use. If the
weight is a quantized layer's, the layer's quantizers would do nothing, and the frozen model would compute something
else, so the use is an error. A product with any other parameter that no site computes stays in float, which a warning
says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daqconvert.errors import ConversionError
from daqconvert.graph.scan import AS_CALLS, ASKED_ATTRIBUTES, ASKED_CALLS, LIKE_CALLS
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, watching
from daqconvert.macs import Event, assign, counting, eager
from daqconvert.macs.counter import Counter
from daqconvert.spec import Plan

_OWNERS = (Tensor, torch)
_QUESTIONS = ASKED_ATTRIBUTES | {"grad", "grad_fn", "_version", "output_nr"}
HARMLESS = {getattr(Tensor, name).__get__ for name in _QUESTIONS if hasattr(getattr(Tensor, name, None), "__get__")}
HARMLESS |= {getattr(o, name) for o in _OWNERS for name in ASKED_CALLS | LIKE_CALLS if hasattr(o, name)}
HARMLESS |= {Tensor.new, Tensor.__repr__, Tensor.__format__, Tensor.__hash__}
AS = {getattr(Tensor, name) for name in AS_CALLS}
SAME = {getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH")} | AS
SAME |= {
    getattr(o, name)
    for name in ("detach", "float", "double", "half", "bfloat16", "type", "cpu", "cuda", "contiguous", "clone", "view")
    for o in _OWNERS
    if callable(getattr(o, name, None)) and not isinstance(getattr(o, name), torch.dtype)
}
"""Functions whose result is a weight with the same values, which is looked for from then on."""


class _Watch(TorchFunctionMode):
    """Looks for the weights of layers in the arguments of every function that is called outside their own modules."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = {id(w): name for name, m in layers.items() if (w := m._parameters.get("weight")) is not None}
        self.running = 0
        self.kept: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.running and func not in HARMLESS:
            given = (*args, *kwargs.values())
            for value in given[:1] if func in AS else given:
                if id(value) in self.names:
                    name = self.names[id(value)]
                    if func in SAME:
                        return self._follow(func(*args, **kwargs), name)
                    raise ConversionError(
                        f"{name}: another module's forward uses its weight without calling it "
                        f"({getattr(func, '__name__', func)}), so its quantizers would do nothing. Leave it alone: "
                        f'daqconvert.quantize(model, exclude=["{name}"]).'
                    )
        return func(*args, **kwargs)

    def _follow(self, same: Any, name: str) -> Any:
        if isinstance(same, Tensor):
            self.names[id(same)] = name
            self.kept.append(same)  # while it lives, no other tensor has its id
        return same

    def enter(self, *_: Any) -> None:
        self.running += 1

    def leave(self, *_: Any) -> None:
        self.running -= 1


class _Inside(Watcher):
    """Tells the `_Watch` that a site is computing and may therefore use its weight."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        self.watch.running += 1
        return x

    def after(self, site: Any, y: Tensor) -> None:
        self.watch.running -= 1


@contextmanager
def watching_weights(
    model: nn.Module, sites: Mapping[str, QuantizedSite], shared: Collection[str] = ()
) -> Iterator[None]:
    """Raise as soon as the forward of `model` uses the weight of a quantized layer without calling it or its site.

    `shared` are layers from whose weight another site's weight is computed (a decoder that uses its encoder's weight);
    their uses are not checked.

    Raises:
        ConversionError: Inside the block; names the layer and the function that used its weight.
    """
    watch = _Watch({n: site for n, site in sites.items() if isinstance(site, QuantizedLayer) and n not in shared})
    with ExitStack() as stack:
        for site in sites.values():
            stack.enter_context(watching(site, _Inside(watch)))
        for module in model.modules():  # a module that shares the weight, such as an embedding, may use it
            if any(id(p) in watch.names for p in module._parameters.values()):
                stack.callback(module.register_forward_pre_hook(watch.enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(watch.leave).remove)
        stack.enter_context(watch)
        yield


class _Ran(Watcher):
    """Collects the products that ran while no site was computing.

    Attributes:
        counter: Counts the products; None outside the forwards that are watched.
        outside: The products that no site computed.
        modes: The modes, training or not, in which a forward that multiplied was watched.
        multiplied: Whether anything was multiplied in the forward that is watched.
    """

    def __init__(self) -> None:
        self.counter: Counter | None = None
        self.outside: list[Event] = []
        self.modes: set[bool] = set()
        self.multiplied = False
        self._open = 0

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        self.take()
        self._open += 1
        return x

    def after(self, site: Any, y: Tensor) -> None:
        self.take()
        self._open -= 1

    def take(self) -> None:
        """Keep what the counter saw since the last call, unless a site was computing, and empty the counter."""
        if self.counter is not None:
            self.multiplied |= bool(self.counter.events)
            self.outside += [] if self._open else self.counter.events
            self.counter.events.clear()


@contextmanager
def comparing(model: nn.Module, sites: Mapping[str, QuantizedSite], plan: Plan | None) -> Iterator[None]:
    """Warn at the end of the context of every product with a parameter that ran in float and has no row in the plan.

    The first forward in each mode, training and evaluation, is watched operator by operator.
    """
    ran, done = _Ran(), ExitStack()

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training in ran.modes or ran.counter is not None:
            return
        done.enter_context(eager(model))
        with torch._C.DisableTorchFunction():  # the counter asks every weight for its memory
            ran.counter = done.enter_context(counting(model, (args, kwargs)))

    def stop(module: nn.Module, *_: Any) -> None:
        ran.take()
        if ran.counter is not None and ran.multiplied:  # an empty batch shows nothing
            ran.modes.add(module.training)
        ran.counter, ran.multiplied = None, False
        done.close()

    with ExitStack() as stack:
        stack.callback(done.close)
        for site in sites.values():
            stack.enter_context(watching(site, ran))
        begin = model.register_forward_pre_hook(start, with_kwargs=True)
        end = model.register_forward_hook(stop, always_call=True)
        stack.callback(begin.remove)
        stack.callback(end.remove)
        yield
    if plan is not None and (found := _unplanned(ran.outside, plan)):
        warnings.warn(
            f"{type(model).__name__}: these products with a weight ran in float, although no row of the plan says so: "
            f"{'; '.join(found)}. They are in code that torch.fx cannot see. To have them quantized, write them as "
            "`x @ weight` or `F.linear(x, weight)` in the forward of the module that holds the weight; to have them "
            "listed in the plan with this reason, give quantize and plan example_inputs=....",
            stacklevel=3,
        )


def _unplanned(events: list[Event], plan: Plan) -> list[str]:
    """Return a text for each product of data with a parameter that is not computed as the plan says."""
    converted, told = {row.name for row in plan.converted}, dict[str, None]()
    calls = [row.site.call for row in plan.skipped if row.site.call is not None]
    listed = {tensor for call in calls for tensor in call.tensors}  # a packed weight has a row for each of its parts
    for event, site in assign([e for e in events if e.learned and e.of_data and not e.attention], plan):
        if site is None or (site in converted and listed.isdisjoint(event.tensors)):
            name = site or (event.tensors[0] if event.tensors else "")
            more = ", in a place beside its site" if site else ""
            told[f"{name} ({event.op} in {event.module or 'the model'}, {event.where}{more})"] = None
    return list(told)
