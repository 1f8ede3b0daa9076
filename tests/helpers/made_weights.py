"""Models in which one layer makes another's weight, each with the network that has this weight as a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Made(nn.Module):
    """A convolution before and behind, and one between them whose weight `make(self)` returns."""

    def __init__(self, make: Callable[[Any], Tensor], **parts: Any) -> None:
        super().__init__()
        self.pre, self.head, self.make = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1), make
        self.position = nn.Parameter(torch.randn(1, 8))
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv1d(self.pre(x), self.make(self)))

    def reference(self) -> nn.Module:
        """The same network with the made weight as a layer's own."""
        layer = nn.Conv1d(4, 4, 3, bias=False)
        layer.weight = nn.Parameter(self.make(self).detach())  # with gradients on, attention takes its slow path
        return nn.Sequential(self.pre, layer, self.head)


class Maker(nn.Module):
    """Makes a weight from what it is given, by a layer or by a parameter of its own."""

    def __init__(self, layer: bool) -> None:
        super().__init__()
        self.w = nn.Linear(8, 48) if layer else nn.Parameter(torch.randn(48, 8))

    def forward(self, z: Tensor) -> Tensor:
        made = self.w(z) if isinstance(self.w, nn.Module) else F.linear(z, self.w)
        return made.view(4, 4, 3)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 48))


def attention() -> nn.Module:
    return nn.MultiheadAttention(12, 2, batch_first=True)


def attended(m: Any) -> Tensor:
    return m.net(m.rows, m.rows, m.rows, need_weights=False)[0].reshape(4, 4, 3)


MADE: dict[str, tuple[Callable[[], Made], str, set[str]]] = {
    "layer": (lambda: Made(lambda m: m.net(m.position).view(4, 4, 3), net=nn.Linear(8, 48)), "net.weight", {"net"}),
    "layers": (
        lambda: Made(lambda m: m.net(m.position).view(4, 4, 3), net=deep()), "net.2.weight", {"net.0", "net.2"},
    ),
    "module": (lambda: Made(lambda m: m.net(m.position), net=Maker(True)), "net.made", {"net.w"}),
    "module-by-call": (lambda: Made(lambda m: m.net(m.position), net=Maker(False)), "net.made", {"net.w"}),
    "attention": (
        lambda: Made(attended, net=attention(), rows=nn.Parameter(torch.randn(1, 4, 12))), "net.made",
        {f"net.{p}" for p in ("q_proj", "k_proj", "v_proj", "attention_scores", "attention_values", "out_proj")},
    ),
    "embedding": (
        lambda: Made(lambda m: m.net(m.rows).view(4, 4, 3), net=nn.Embedding(4, 12),
                     rows=nn.Parameter(torch.arange(4), requires_grad=False)),
        "net.weight", set(),
    ),
    "sum-of-products": (
        lambda: Made(lambda m: (m.w + m.b @ m.a).view(4, 4, 3), w=nn.Parameter(torch.randn(4, 12)),
                     a=nn.Parameter(torch.randn(2, 12)), b=nn.Parameter(torch.randn(4, 2))),
        "w", set(),
    ),
    "layers-never-called": (
        lambda: Made(lambda m: (m.w.weight + m.b.weight @ m.a.weight).view(4, 4, 3), w=nn.Linear(12, 4),
                     a=nn.Linear(12, 2), b=nn.Linear(2, 4)),
        "w.weight", {"w", "a", "b"},
    ),
}  # fmt: skip
"""Name -> the model, the name of the site with the made weight, and the sites that make it."""
