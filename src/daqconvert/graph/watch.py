"""Watching a real forward for weights that it uses without calling their layer.

A trace finds `F.linear(x, self.qkv.weight)` only if fx can follow the code; a real forward shows every use. The
quantizers of such a layer would do nothing, and the frozen model would compute something else, so the use is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daqconvert.errors import ConversionError
from daqconvert.layers.base import QuantizedLayer
from daqconvert.layers.site import Operation, QuantizedSite, Watcher, watching

_QUESTIONS = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_sparse")
HARMLESS = {getattr(Tensor, name).__get__ for name in _QUESTIONS}
HARMLESS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous}


class _Watch(TorchFunctionMode):
    """Looks for the weights of layers in the arguments of every function that is called outside their own modules."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = {id(w): name for name, m in layers.items() if (w := m._parameters.get("weight")) is not None}
        self.running = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.running and func not in HARMLESS:
            for value in (*args, *kwargs.values()):
                if id(value) in self.names:
                    name = self.names[id(value)]
                    raise ConversionError(
                        f"{name}: another module's forward uses its weight without calling it "
                        f"({getattr(func, '__name__', func)}), so its quantizers would do nothing. Leave it alone: "
                        f'daqconvert.quantize(model, exclude=["{name}"]).'
                    )
        return func(*args, **kwargs)

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
