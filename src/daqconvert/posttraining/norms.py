"""The running statistics of batch norms, estimated again for the present weights.

A running statistic is a moving average over training steps, each of which had other weights. So it may not fit the
present model. The mean over some batches that all pass the present weights, each batch counted equally, does.

Source: "Rethinking 'Batch' in BatchNorm" (Wu, Johnson, 2021), https://arxiv.org/abs/2105.07576, section 3 (PreciseBN).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from daqconvert.models import evaluating


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a model that keep running statistics.

    Example:
        >>> len(batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3, track_running_stats=False))))
        1
    """
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Any, autocast: Any = torch.enable_grad) -> None:
    """Replace the running statistics of all batch norms by the mean of the statistics of some batches.

    All other modules are in evaluation mode meanwhile, so there is no dropout. Empty batches do not count.

    Args:
        model: Any model; afterwards its modules are in the modes that they had.
        batches: Pairs `(args, kwargs)`, one for each batch.
        autocast: Function that returns the context manager of a forward.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> reestimate(norm, [((torch.tensor([[0.0], [2.0]]),), {}), ((torch.tensor([[4.0], [4.0]]),), {})])
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.5, 1.0)
    """
    norms, handles = batch_norms(model), []
    momenta = [module.momentum for module in norms]
    with evaluating(model), _eager(model):
        try:
            for module in norms:
                module.reset_running_stats()
                module.momentum, module.training = None, True  # None: equal weight for each batch
                handles.append(module.register_forward_pre_hook(_pass_over_nothing, with_kwargs=True))
            for args, kwargs in batches:
                with autocast(), torch.no_grad():
                    model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum


def _pass_over_nothing(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep an empty batch out of the mean: torch would count it, with the statistics of before."""
    norm.training = (args[0] if args else kwargs["input"]).numel() > 0


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a compiled model runs eagerly: batch norms that count batches break its graph."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
