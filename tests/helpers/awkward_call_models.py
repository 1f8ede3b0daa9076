"""Awkward models that multiply in their own forward, or whose layers have forwards of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Between(nn.Module):
    """A linear layer before and one after another module."""

    def __init__(self, inner: nn.Module, before: int, after: int, width: int | None = None) -> None:
        super().__init__()
        self.a, self.inner, self.b = nn.Linear(before, width or before), inner, nn.Linear(after, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.inner(self.a(x)))


class Bare(nn.Module):
    """One product of a ReLU's output with one bare parameter, in one of the ways of `BARE`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.kernel = kind, nn.Parameter(torch.randn(BARE[kind]))

    def forward(self, x: Tensor) -> Tensor:
        x, w = torch.relu(x), self.kernel
        match self.kind:
            case "linear":
                return F.linear(x, w)
            case "linear-keywords":
                return F.linear(weight=w * 2.0, bias=w[0], input=x)
            case "matmul":
                return x @ w
            case "method":
                return x.matmul(w.t())
            case "einsum":
                return torch.einsum("bi,io->bo", x, w)
            case "einsum-left":
                return torch.einsum("oi,bi->bo", w, x)
            case "left":
                return torch.matmul(w, x.t()).t()
            case "addmm":
                return torch.addmm(x.new_ones(4), x, w)
            case "bmm":
                return torch.bmm(x[None].expand(2, -1, -1), w).sum(0)
            case "conv1d":
                return F.conv1d(x.flatten(2), w[:, :, 0], padding=1).unflatten(2, x.shape[2:])
            case "conv2d":
                return F.conv2d(x, w, None, 2)
            case "conv2d-keywords":
                return torch.conv2d(input=x, weight=w, groups=2)
            case "transpose":
                return F.conv_transpose2d(x, w, stride=2, groups=2)
        raise ValueError(self.kind)


BARE = {
    "linear": (4, 4), "linear-keywords": (4, 4), "matmul": (4, 4), "method": (4, 4), "einsum": (4, 4),
    "einsum-left": (4, 4), "left": (4, 4), "addmm": (4, 4), "bmm": (2, 4, 4), "conv1d": (4, 4, 1, 3),
    "conv2d": (4, 4, 3, 3), "conv2d-keywords": (4, 2, 1, 1), "transpose": (4, 2, 3, 3),
}  # fmt: skip
"""Ways to multiply by a bare parameter -> its shape."""


class Stored(nn.Module):
    """The function that multiplies is an attribute of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.function, self.kernel = F.linear, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kernel)


def between(inner: Callable[[], nn.Module], before: int, after: int, width: int | None = None) -> nn.Module:
    return Between(inner(), before, after, width)


def chain_of(layer: Callable[[], nn.Module]) -> nn.Module:
    """A layer from 4 channels to 4 between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer(), nn.Conv2d(4, 2, 1))


class LoRA(nn.Linear):
    """A linear with two low-rank parameters beside its own weight."""

    def __init__(self, features: int, rank: int = 2) -> None:
        super().__init__(features, features)
        self.down, self.up = (nn.Parameter(torch.randn(features, rank)), nn.Parameter(torch.randn(rank, features)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ self.down) @ self.up


class Cond(nn.Module):
    """timm's CondConv2d: the weight of every sample is mixed from experts."""

    def __init__(self) -> None:
        from timm.layers import CondConv2d

        super().__init__()
        self.stem, self.routing = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.conv, self.head = CondConv2d(4, 4, 3, padding=1, num_experts=3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.conv(x, torch.sigmoid(self.routing(x.mean((2, 3))))))


class Masked(nn.Module):
    """Swin v2's window attention, which gets a mask."""

    def __init__(self, attention: nn.Module, windows: int = 2, tokens: int = 4) -> None:
        super().__init__()
        self.attn = attention
        self.register_buffer("mask", torch.zeros(windows, tokens, tokens).index_fill_(2, torch.tensor([1]), -100.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, mask=self.mask)


def timm_attention(kind: str) -> nn.Module:
    from timm.models import beit, swin_transformer_v2

    if kind == "beit":
        return beit.Attention(8, num_heads=2, qkv_bias=True, window_size=(1, 3))
    return swin_transformer_v2.WindowAttention(8, window_size=(2, 2), num_heads=2)


def torchvision_attention(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    cls = swin.ShiftedWindowAttention if version == 1 else swin.ShiftedWindowAttentionV2
    return cls(8, window_size=[2, 2], shift_size=[1, 1], num_heads=2)


class OptionalPath(nn.Module):
    """An optional mask and a flag choose the path; each path has other products."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.extra = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.only_masked = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, mask: Tensor | None = None, double: bool = False) -> Tensor:
        h = F.linear(x, self.fc.weight, self.fc.bias)
        if mask is not None:
            h = (h * mask) @ self.only_masked
        if double:
            h = h @ self.extra
        return h + 1.0 if self.training else h - 1.0


class SharedLinear(nn.Module):
    """A linear layer that is called, and whose weight is also used by function calls in two other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.left, self.right = Uses(self.fc), Uses(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.left(x) + self.right(x))


class Uses(nn.Module):
    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.shared = fc

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.shared.weight))


class Shadow(nn.Module):
    """A module whose forward is rewritten, called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Bare("matmul")
        self.second, self.head = self.first, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


class PlainSubclass(nn.Conv2d):
    """A subclass that adds only a constructor and an attribute."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.note = "mine"


class BranchesAndMultiplies(nn.Module):
    """Branches on data and multiplies in its own forward, so that fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.free = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kernel = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.fc.weight) @ self.kernel
        return self.free(x) if x.sum() < 1e9 else x


class Recurrents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gru, self.cell = nn.Linear(4, 4), nn.GRU(4, 6, batch_first=True), nn.LSTMCell(6, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.cell(self.gru(self.a(x))[0][:, -1])[0])


def old_spectral_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))


def parametrized_conv(kind: str) -> nn.Module:
    return getattr(parametrizations, kind)(nn.Conv2d(4, 4, 1))


class SelfAttention(nn.Module):
    """An attention block that attends to its input, to a part of it, or to something else."""

    def __init__(self, other: tuple[int, int] | None = None, **options: Any) -> None:
        super().__init__()
        keys = dict(zip(("kdim", "vdim"), other, strict=True)) if other else {}
        self.other = other
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, **keys, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.other is None:
            return self.attn(x, x, x)[0]
        return self.attn(x, x[..., : self.other[0]], x[..., : self.other[1]], need_weights=False)[0]


class PaddedEncoder(nn.Module):
    """A stack of encoder layers with a padding mask: evaluated without gradients torch packs what is not padding."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, layers, enable_nested_tensor=True), nn.Linear(8, 2)
        self.register_buffer("padding", torch.tensor([[False, False, False], [False, False, True]]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=self.padding)
        return self.head(hidden.masked_fill(self.padding[..., None], 0.0))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x[:, :2] * 0.5)
