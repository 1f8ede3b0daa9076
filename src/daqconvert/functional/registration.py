"""What the fused operators share: their library of operators, and the refusal of a second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from daqconvert.errors import DaqError

# torch.library gives its own methods no types
_LIBRARY: Any = torch.library.Library("daqconvert", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(
    schema: str, forward: Callable[..., Any], fake: Callable[..., Any], backward: Callable[..., Any],
    remember: Callable[..., Any] | None = None,
) -> None:  # fmt: skip
    """Register an operator of this project with the dispatcher, for every device.

    Args:
        schema: As torch writes it, without the namespace.
        forward: Computes it, without gradient.
        fake: Returns empty tensors of the right shapes: what FakeTensor and the compiler see.
        backward: Its gradients, from the context and those of its outputs.
        remember: Saves what `backward` needs.
    """
    name = f"daqconvert::{schema.partition('(')[0]}"
    # a compiler may keep its tensors in the layout that its convolutions like: without the tag it would transpose them
    _LIBRARY.define(schema, tags=(torch.Tag.flexible_layout,))
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=remember, lib=_LIBRARY)


def refuse(ctx: Any, *grads: Any) -> Any:
    """Refuse a second derivative: the backward of a backward.

    Args:
        ctx: Of the backward.
        grads: What arrived at it.

    Raises:
        DaqError: Always.
    """
    raise DaqError(
        "dasr has no second derivative: its slope holds the temperature controller constant. "
        "Drop create_graph=True, or compute the penalty under `with daqconvert.disabled(model):`."
    )
