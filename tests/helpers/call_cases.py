"""More awkward models: products in a module's own forward, layers with forwards of their own, attention blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from helpers import awkward_call_models as calls
from helpers.cases import IMAGE, VECTOR, Case, products, projections

TOKENS = ((2, 3, 8),)
RECURRENT = "recurrent layer"


def timm_layer(name: str) -> nn.Module:
    """A convolution of timm from 4 channels to 4; timm is imported here, for it takes a second."""
    import timm.layers

    layer: nn.Module = getattr(timm.layers, name)(4, 4, 3)
    return layer


def _between(make: Any, before: int = 4, after: int = 4) -> Any:
    return partial(calls.between, make, before, after)


def _in_chain(name: str, make: Any) -> Case:
    """Return the case of a convolution between two others, after a ReLU."""
    return Case(
        name, partial(calls.chain_of, make), IMAGE, ("0", "2", "3"), unsigned=("2",), first=("0",), last=("3",)
    )


def _bare(kind: str) -> Case:
    image = "conv" in kind or kind == "transpose"
    make = partial(calls.Bare, kind)
    prefix, ends = ("2", ("0", "3")) if image else ("inner", ("a", "b"))
    site = f"{prefix}.kernel"
    return Case(
        f"bare-{kind}", partial(calls.chain_of, make) if image else _between(make), IMAGE if image else VECTOR,
        (ends[0], site, ends[1]), holders={site: f"{site}_site"}, unsigned=(site,) if kind not in UNPROVEN else (),
        first=ends[:1], last=ends[1:],
    )  # fmt: skip


UNPROVEN = {"matmul", "method", "einsum", "einsum-left", "left", "addmm", "bmm"}
# Kinds of `Bare` whose input is not proven unsigned: only that of `F.linear` and `F.conv*`, their first argument, is


def _attention(name: str, make: Any, shape: tuple[int, ...], block: str, *others: str, **more: Any) -> Case:
    return Case(
        name, _between(make, 8, 8), (shape,), ("a", f"{block}.qkv", *others, f"{block}.proj", "b"),
        first=("a",), last=("b",), **more,
    )  # fmt: skip


def _mlp(block: str) -> tuple[str, str]:
    return f"{block}.cpb_mlp.0", f"{block}.cpb_mlp.2"


def _heads(name: str, **options: Any) -> Case:
    block = "inner.attn"
    return Case(
        name, _between(partial(calls.SelfAttention, **options), 8, 8), TOKENS,
        ("a", *projections(block), f"{block}.out_proj", "b"), holders=projections(block), products=products(block),
        unsigned=(f"{block}.attention_values",), first=("a",), last=("b",),
    )  # fmt: skip


def _inside(*blocks: str) -> dict[str, Any]:
    """Return the sites of attention blocks, as arguments of a case."""
    return {
        "holders": {site: holder for block in blocks for site, holder in projections(block).items()},
        "products": tuple(product for block in blocks for product in products(block)),
        "unsigned": tuple(f"{block}.attention_values" for block in blocks),
    }


def _layers(*blocks: str) -> tuple[str, ...]:
    return tuple(name for block in blocks for name in (*projections(block), f"{block}.out_proj"))


ENCODER = tuple(f"encoder.layers.{i}.self_attn" for i in range(2))
DECODER = ("layer.self_attn", "layer.multihead_attn")

CALLS = (
    *(_in_chain(name, partial(timm_layer, name))
      for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "Conv2dSame")),
    *map(_bare, calls.BARE),
    _in_chain("plain-subclass", partial(calls.PlainSubclass, 4)),
    Case("stored-function", _between(calls.Stored), VECTOR, ("a", "inner.kernel", "b"),
         holders={"inner.kernel": "inner.kernel_site"}, first=("a",), last=("b",)),
    Case("cond-conv", calls.Cond, IMAGE, ("stem", "routing", "conv.weight", "conv.weight#2", "head"),
         holders={"conv.weight": "conv.weight_site", "conv.weight#2": "conv.weight_site_2"}, unsigned=("routing",),
         first=("stem",), last=("head",)),
    _attention("beit", partial(calls.timm_attention, "beit"), (2, 4, 8), "inner", products=products("inner"),
               unsigned=("inner.attention_values",)),
    _attention("swin-v2", partial(calls.timm_attention, "swinv2"), (2, 4, 8), "inner", *_mlp("inner"),
               products=("inner.matmul", "inner.matmul#2"), unsigned=("inner.cpb_mlp.2",)),
    _attention("swin-v2-masked", lambda: calls.Masked(calls.timm_attention("swinv2")), (2, 4, 8), "inner.attn",
               *_mlp("inner.attn"), products=("inner.attn.matmul", "inner.attn.matmul#2"),
               unsigned=("inner.attn.cpb_mlp.2",)),
    _attention("torchvision-swin", partial(calls.torchvision_attention, 1), (1, 4, 4, 8), "inner"),
    _attention("torchvision-swin-v2", partial(calls.torchvision_attention, 2), (1, 4, 4, 8), "inner",
               *_mlp("inner"), unsigned=("inner.cpb_mlp.2",)),
    Case("lora", _between(partial(calls.LoRA, 4)), VECTOR, ("a", "inner", "inner.down", "inner.up", "b"),
         holders={"inner.down": "inner.down_site", "inner.up": "inner.up_site"}, first=("a",), last=("b",)),
    Case("optional-path", _between(calls.OptionalPath), VECTOR,
         ("a", "inner.fc", "inner.only_masked", "inner.extra", "b"), first=("a",), last=("b",),
         holders={"inner.only_masked": "inner.only_masked_site", "inner.extra": "inner.extra_site"}),
    Case("shared-linear", calls.SharedLinear, VECTOR, ("fc",), first=("fc",), last=("fc",),
         notes={"fc": "linear called by left, right"}),
    Case("two-names-of-a-call", calls.Shadow, VECTOR, ("first.kernel", "head"),
         holders={"first.kernel": "first.kernel_site"}, first=("first.kernel",), last=("head",)),
    Case("branches-and-multiplies", _between(calls.BranchesAndMultiplies), VECTOR, ("a", "inner.free", "b"),
         {"inner.fc": "symbolically traced variables cannot be used as inputs to control flow",
          "inner.kernel": "symbolically traced variables cannot be used as inputs to control flow"},
         first=("a",), last=("b",), order="modules"),
    Case("recurrents", calls.Recurrents, ((2, 3, 4),), ("a", "b"), {"gru": RECURRENT, "cell": RECURRENT},
         first=("a",), last=("b",)),
    Case("old-spectral-norm", calls.old_spectral_norm, VECTOR, ("0", "2"), unsigned=("2",), first=("0",), last=("2",)),
    _in_chain("spectral-norm", partial(calls.parametrized_conv, "spectral_norm")),
    _in_chain("orthogonal", partial(calls.parametrized_conv, "orthogonal")),
    _in_chain("weight-norm", partial(calls.parametrized_conv, "weight_norm")),
    _heads("self-attention"),
    _heads("cross-attention", other=(4, 6), add_bias_kv=True, add_zero_attn=True),
    Case("padded-encoder", calls.PaddedEncoder, TOKENS,
         (*_layers(*ENCODER), *(f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)), "head"),
         first=tuple(projections(ENCODER[0])), last=("head",), **_inside(*ENCODER)),
    Case("decoder", calls.Decoder, TOKENS, (*_layers(*DECODER), "layer.linear1", "layer.linear2"),
         first=tuple(projections(DECODER[0])), last=("layer.linear2",), **_inside(*DECODER)),
)  # fmt: skip
