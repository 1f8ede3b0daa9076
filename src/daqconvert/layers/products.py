"""Attention with its two products as sites: `softmax(q k^T * scale + mask) v`.

The sites are named `scores` (of queries and keys) and `values` (of probabilities and values). As long as neither is to
compute, torch's own fused function does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.functional import call_site
from daqconvert.layers.site import QuantizedSite

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
