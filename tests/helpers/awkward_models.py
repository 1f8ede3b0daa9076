"""The awkward models of `cases.py`: what real code does that a naive swap of layers gets wrong."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


class Chain(nn.Sequential):
    def __init__(self, channels: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, bias=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, 5),
        )


class Residual(nn.Module):
    """Stem, a block whose sum passes a ReLU, head; by the shortcut, the output of `stem` reaches the sum too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.c1 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.c2, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.relu(self.c2(self.bn(self.c1(x))) + x)
        return self.head(x.mean((2, 3)))


class InputShortcut(nn.Module):
    """The input itself is added behind `a`, so `b` is a first site too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x) + x)
        return self.c(h.sigmoid())


class CalledTwice(nn.Module):
    """`mid` gets a ReLU's output in its first call and a signed one in its second: it is not proven unsigned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mid, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.mid(self.mid(torch.relu(self.a(x))))))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.z = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.z(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(self.embed((x.abs() * 2).long().clamp(max=6)))))


class Projection(nn.Module):
    """Uses the weight of its own child in a functional call, as BEiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.linear(x, weight=self.qkv.weight, bias=self.shift))


class BranchOnData(nn.Module):
    """Control flow on values: no whole-model trace; the functional call inside `inner` must be seen all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(4, 4), Projection(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.sum() > 1e9:
            h = h * 2
        return self.b(torch.relu(self.inner(h)))


class BareParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.kernel, self.raw = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(torch.relu(self.a(x)), self.kernel, padding=1)
        return self.b(torch.relu(F.conv2d(x, weight=(self.raw - self.raw.mean()) * 0.5)))


class ShiftedConv(nn.Conv2d):
    """A subclass with a forward of its own, as `StdConv2d`: swapping it for a plain convolution would lose that."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias) + 1.0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attn, self.b = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.attn(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(4, 4), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.rnn(self.a(x))[0])


class KeywordInputs(nn.Module):
    """Two keyword inputs with no default to fall back on, and a flag that must keep its default."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, *, image: Tensor, extra: Tensor | None = None, raw: bool = False) -> Tensor:
        h = torch.relu(self.a(input=image))
        if extra is not None:
            h = h + torch.relu(self.b(input=extra))
        return h if raw else self.c(h)


class Optional(nn.Module):
    """With `bound=None`, its default, no ReLU comes before `b`; a trace that gives it would find `b` unsigned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, bound: Tensor | None = None, features: bool = False) -> Tensor:
        h = self.a(x)
        if bound is not None:
            h = torch.relu(h - bound)
        return h if features else self.b(h)


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(6, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.same(torch.relu(self.down(x)), output_size=(x.shape[2], x.shape[3]))
        return self.up(torch.relu(h), [2 * x.shape[2], 2 * x.shape[3]])


class Caching(nn.Module):
    """Keeps its results and counts its calls: after tracing there must be no proxies in it, and the same count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.hidden = torch.relu(self.a(x.to(self.a.weight.dtype)))
        self.seen.append(self.hidden)
        return self.b(self.hidden)


class Mutating(nn.Module):
    """A ReLU's output that is changed in place before `b`, and a subtraction, `add` with `alpha=-1`, before `c`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        h.sub_(1.0)
        first = torch.relu(self.b(h))
        second = self.c(torch.add(first, torch.relu(x), alpha=-1))
        return self.d(torch.relu(second).clamp(max=6.0))


def with_zero_channel() -> nn.Module:
    model = Chain()
    with torch.no_grad():
        model[3].weight[2] = 0.0
        model[7].weight[1] = 0.0
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and still in most speech models
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def complex_first() -> nn.Module:
    class Modulus(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs()

    class Lift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.complex64)

    return nn.Sequential(Lift(), nn.Linear(4, 4, dtype=torch.complex64), Modulus(), nn.Linear(4, 2))


class Routed(nn.Module):
    """A model with an auxiliary head that only training calls, as Inception's; its input has both signs."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.aux = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return (self.head(h), self.aux(h)) if self.training else self.head(h)


def new_network():
    """Return a network whose running statistics are those of no data, which shrink what goes through it."""
    layers = [
        (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for i in range(4)
    ]
    for conv, *_ in layers:
        nn.init.normal_(conv.weight, std=0.02)
    return nn.Sequential(
        *(m for layer in layers for m in layer), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
