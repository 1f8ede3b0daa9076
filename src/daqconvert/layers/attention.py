"""`nn.MultiheadAttention` with its projections as sites: torch's own forward never calls a layer, nor even `out_proj`.

Each of the three input projections is a site of its own, `q_proj`, `k_proj`, `v_proj`, for their inputs may differ;
they are rows of one `in_proj_weight` where torch keeps them so. `out_proj` is an ordinary layer, and is called.

Attention with its two products as sites: `softmax(q k^T * scale + mask) v`.

The sites are named `scores` (of queries and keys) and `values` (of probabilities and values). As long as neither is to
compute, torch's own fused function does.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daqconvert.layers.call_holders import call_site
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.site import QuantizedSite

_UNFUSED: dict[type[nn.Module], type[Any]] = {}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def projection_weight(module: nn.MultiheadAttention, projection: str) -> Tensor:
    """Return the weight of one input projection, `(E, E)`, `(E, kdim)` or `(E, vdim)`.

    Args:
        module: The attention block.
        projection: One of `PROJECTIONS`.
    """
    if module.in_proj_weight is None:
        own: Tensor = getattr(module, f"{projection}_weight")
        return own
    rows = PROJECTIONS.index(projection) * module.embed_dim
    return module.in_proj_weight[rows : rows + module.embed_dim]


class QuantMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections and products are sites; masks and results as torch has them."""

    def forward(  # noqa: D102 # torch's own, argument by argument
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not is_active(self):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        turned = query.dim() == 3 and not self.batch_first
        if turned:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._project(name, x) for name, x in zip(PROJECTIONS, (query, key, value), strict=True))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        mask = merged_mask(self, attn_mask, key_padding_mask, q, k.shape[-2])
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(-3, -2) for x in (q, k, v))
        attended, weights = self._attend(q, k, v, mask, need_weights)
        out = self.out_proj(attended.transpose(-3, -2).flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=-3)
        return (out.transpose(0, 1) if turned else out), weights

    def _project(self, name: str, x: Tensor) -> Tensor:
        holder = self._modules.get(f"{name}_site")
        coded = isinstance(holder, FrozenSite) and "weight_codes" in holder._buffers
        start = PROJECTIONS.index(name) * self.embed_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[start : start + self.embed_dim]
        return call_site(holder, "linear", 1, (x, None if coded else projection_weight(self, name), bias), {})

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the learned one and the zero one behind them, where the block has such."""
        if bias is not None:
            x = torch.cat([x, bias.reshape(-1).expand(*x.shape[:-2], 1, -1)], dim=-2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout = self.dropout if self.training else 0.0
        scores, values = self._modules.get(f"{SCORES}_site"), self._modules.get(f"{VALUES}_site")
        if not need_weights:
            return attention(scores, values, q, k, v, mask, dropout), None
        weights = attention_probabilities(scores, q, k, mask, dropout)
        return call_site(values, "matmul", 1, (weights, v), {}), weights


# `inspect.signature` says what torch's says, annotations included
functools.update_wrapper(QuantMultiheadAttention.forward, nn.MultiheadAttention.forward, assigned=())


def merged_mask(
    module: nn.MultiheadAttention, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
) -> Tensor | None:
    """Return both masks as one that is added to the scores: `-inf` where a boolean one says True.

    Args:
        module: The attention block.
        attn_mask: `(L, S)` or `(B * heads, L, S)`, boolean or floating, or None.
        key_padding_mask: `(B, S)` or `(S,)`, likewise.
        q: The queries, `(B, L, E)` or `(L, E)`.
        keys: Number of keys, those that the block adds included.
    """
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        masks.append(mask.unflatten(0, (-1, module.num_heads)) if mask.dim() == 3 and q.dim() == 3 else mask)
    if key_padding_mask is not None:
        mask = _additive(key_padding_mask, q.dtype)
        masks.append(mask[:, None, None, :] if mask.dim() == 2 else mask)
    if not masks:
        return None
    whole = masks[0] if len(masks) == 1 else masks[0] + masks[1]
    return F.pad(whole, (0, keys - whole.shape[-1])) if keys > whole.shape[-1] else whole


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def is_active(module: nn.Module) -> bool:
    """Whether a site inside a module is to compute, or is being watched: else torch's own, fused path is right."""
    return any(is_computing(child) for child in module.modules())


def unfused_class(original: type[nn.Module]) -> type[Any]:
    """Return a subclass of an encoder (layer) that does not take torch's fused path while a site in it is active.

    The fused kernel of `nn.TransformerEncoderLayer` in evaluation reads the weights and calls no layer; what it asks
    first is an attribute, which is a question here.

    Args:
        original: A class derived from `nn.TransformerEncoderLayer` or `nn.TransformerEncoder`.
    """
    name = "activation_relu_or_gelu" if issubclass(original, nn.TransformerEncoderLayer) else "use_nested_tensor"

    def ask(self: Any) -> Any:
        return 0 if is_active(self) else self.__dict__.get(name, 0)

    def keep(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    def reduce(self: Any, protocol: Any) -> Any:
        return _remake, (original,), self.__dict__

    if original not in _UNFUSED:
        body = {name: property(ask, keep), "original": original, "__reduce_ex__": reduce}
        body["__module__"] = original.__module__
        _UNFUSED[original] = type(f"Unfused{original.__name__}", (original,), body)
    return _UNFUSED[original]


def _remake(original: type[nn.Module]) -> Any:
    cls: Any = unfused_class(original)
    return cls.__new__(cls)


SCORES, VALUES = "attention_scores", "attention_values"


def attention(
    scores: Any, values: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute what `F.scaled_dot_product_attention` computes, its products by their sites.

    Args:
        scores: Holder of the first product, or None.
        values: Holder of the second product, or None.
        query: `(..., heads, L, E)`.
        key: `(..., heads, S, E)`.
        value: `(..., heads, S, Ev)`.
        attn_mask: Boolean (True takes part) or added to the scores, broadcast to `(..., heads, L, S)`.
        dropout_p: Of the probabilities; applied whenever it is not 0, as torch does.
        is_causal: Mask what comes later.
        scale: Of the scores; None for `1 / sqrt(E)`.
        enable_gqa: Keys and values have fewer heads than queries, each for several.
    """
    if not (is_computing(scores) or is_computing(values)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    mask = attn_mask
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    probabilities = attention_probabilities(scores, query, key, mask, dropout_p, scale)
    return call_site(values, "matmul", 1, (probabilities, value), {})


def attention_probabilities(
    scores: Any, query: Tensor, key: Tensor, mask: Tensor | None, dropout_p: float, scale: float | None = None
) -> Tensor:
    """Return `dropout(softmax(q k^T * scale + mask))`.

    Args:
        scores: Holder of the product, or None.
        query: `(..., L, E)`.
        key: `(..., S, E)`.
        mask: Boolean (True takes part) or added, or None.
        dropout_p: Of the probabilities.
        scale: None for `1 / sqrt(E)`.
    """
    factor = math.sqrt(1.0 / query.shape[-1]) if scale is None else scale
    found = call_site(scores, "matmul", 1, (query * factor, key.transpose(-2, -1)), {})
    if mask is not None:
        found = found.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else found + mask
    probabilities = torch.softmax(found, dim=-1)
    return F.dropout(probabilities, dropout_p) if dropout_p > 0.0 else probabilities


def is_computing(holder: Any) -> bool:
    """Whether a holder is to compute, or is being watched."""
    if isinstance(holder, QuantizedSite):
        return holder.enabled or bool(holder.watchers)
    return isinstance(holder, FrozenSite)
