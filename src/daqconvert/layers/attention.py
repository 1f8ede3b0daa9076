"""Attention whose two products are sites: as a function, in `nn.MultiheadAttention` and in torch's encoders.

    attention = softmax(q k^T * scale + mask) v        sites `attention_scores` (q k^T) and `attention_values`

While no site of an attention block computes quantized or is watched, torch's own fused kernels run instead.

torch's `nn.MultiheadAttention` calls no layer, not even its `out_proj`. `QuantMultiheadAttention` makes each of the
three input projections a site of its own (`q_proj`, `k_proj`, `v_proj`), because their inputs may differ; their
weights may be rows of one `in_proj_weight`. It calls `out_proj` like any other layer.
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

SCORES, VALUES = "attention_scores", "attention_values"
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_UNFUSED: dict[type[nn.Module], type[Any]] = {}


def attention(
    scores: Any, values: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Compute `F.scaled_dot_product_attention` with its two products computed by their sites.

    `scores` and `values` are the holders of the two products; None for a product that is not a site.
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
    """Return `dropout(softmax(q k^T * scale + mask))`, shape `(..., L, S)`; the site `scores` computes `q k^T`.

    A boolean mask is True where a key takes part; any other mask is added. If `scale` is None, it is `1 / sqrt(E)`.
    """
    factor = math.sqrt(1.0 / query.shape[-1]) if scale is None else scale
    logits = call_site(scores, "matmul", 1, (query * factor, key.transpose(-2, -1)), {})
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    probabilities = torch.softmax(logits, dim=-1)
    return F.dropout(probabilities, dropout_p) if dropout_p > 0.0 else probabilities


def is_computing(holder: Any) -> bool:
    """Whether a holder is a site that computes quantized or is being watched."""
    if isinstance(holder, QuantizedSite):
        return holder.enabled or bool(holder.watchers)
    return isinstance(holder, FrozenSite)


class QuantMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections and products are sites; masks and results are as in torch."""

    def forward(  # noqa: D102 # has torch's documentation
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
        has_codes = isinstance(holder, FrozenSite) and "weight_codes" in holder._buffers
        start = PROJECTIONS.index(name) * self.embed_dim
        bias = None if self.in_proj_bias is None else self.in_proj_bias[start : start + self.embed_dim]
        return call_site(holder, "linear", 1, (x, None if has_codes else projection_weight(self, name), bias), {})

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the learned and the zero key or value, if the block has them."""
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


# so that `inspect.signature` returns what it returns for torch's forward, annotations included
functools.update_wrapper(QuantMultiheadAttention.forward, nn.MultiheadAttention.forward, assigned=())


def projection_weight(module: nn.MultiheadAttention, projection: str) -> Tensor:
    """Return the weight of one input projection (a name of `PROJECTIONS`): `(E, E)`, `(E, kdim)` or `(E, vdim)`."""
    if module.in_proj_weight is None:
        own: Tensor = getattr(module, f"{projection}_weight")
        return own
    rows = PROJECTIONS.index(projection) * module.embed_dim
    return module.in_proj_weight[rows : rows + module.embed_dim]


def merged_mask(
    module: nn.MultiheadAttention, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
) -> Tensor | None:
    """Combine the two masks of a call into one that is added to the scores: `-inf` where a boolean mask is True.

    `attn_mask` is `(L, S)` or `(B * heads, L, S)`, `key_padding_mask` `(B, S)` or `(S,)`; each is boolean, floating or
    None. The queries `q` are `(B, L, E)` or `(L, E)`; `keys` is the number of keys, including those that the block
    adds (`add_bias_kv`, `add_zero_attn`). The result is None if both masks are None.
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
    """Whether any site inside a module computes quantized or is being watched; if not, torch's fused path is right."""
    return any(is_computing(child) for child in module.modules())


def unfused_class(original: type[nn.Module]) -> type[Any]:
    """Return a subclass of an encoder, or encoder layer, that avoids torch's fused path while a site in it is active.

    In evaluation mode `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` may run a fused kernel, which reads the
    weights and calls no layer. Each reads one of its attributes to decide whether it may. The subclass replaces this
    attribute by a property that is 0 (no fused kernel) while a site is active.
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
