"""Mixup and cutmix by timm: two images become one, and so do their targets.

One weight and one box for a batch, drawn from NumPy's global generator; the i-th input of an even batch is mixed with
the i-th from its end. The last input of an odd batch stays as it is.

Sources: "mixup: Beyond Empirical Risk Minimization" (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018),
https://arxiv.org/abs/1710.09412; "CutMix" (Yun et al., ICCV 2019), https://arxiv.org/abs/1905.04899; timm,
`timm.data.Mixup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daqconvert.errors import DataError
from daqconvert.training.batching.loaders import Inputs
from daqconvert.training.losses import checked_target
from daqconvert.training.recipes import Recipe


@dataclass(frozen=True)
class Mixture:
    """Inputs that were mixed, and how.

    Attributes:
        inputs: Positional and keyword arguments.
        shares: `(N, N)`; row i: the shares of the targets in target i.
    """

    inputs: Inputs
    shares: Tensor

    def target(self, logits: Tensor, target: Any) -> Tensor:
        """Return the mixed targets as probabilities, shape and dtype of the logits.

        Args:
            logits: `(N, C)`.
            target: Class numbers `(N,)` or probabilities `(N, C)`.

        Raises:
            DataError: If it is neither, or a class number is none of the model's.
        """
        found = checked_target(logits, target)
        if logits.dim() != 2:
            raise DataError(f"mixup and cutmix: expected logits (N, C), found shape {tuple(logits.shape)}.")
        if not found.is_floating_point():
            if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < logits.shape[1]:
                raise DataError(
                    f"mixup and cutmix: expected targets 0 to {logits.shape[1] - 1}, found {int(found.min())} to "
                    f"{int(found.max())}."
                )
            found = F.one_hot(found, logits.shape[1])
        return self.shares.to(logits.dtype) @ found.to(logits.dtype)


def mixed(inputs: Inputs, recipe: Recipe) -> Mixture:
    """Return a batch with its inputs mixed; the caller's tensors stay as they are.

    Args:
        inputs: Positional and keyword arguments with one floating-point tensor among them, `(N, ...)`; with cutmix
            images `(N, C, H, W)`.
        recipe: Gives `mixup` and `cutmix`, not both 0.

    Raises:
        DataError: If the inputs are not of that form.

    Example:
        >>> mixture = mixed(((torch.ones(3, 1, 2, 2),), {}), Recipe(mixup=1.0))
        >>> mixture.shares.sum(dim=1).tolist()
        [1.0, 1.0, 1.0]
    """
    from timm.data import Mixup

    args, kwargs = inputs
    places: list[Any] = [
        *((i, value) for i, value in enumerate(args) if isinstance(value, Tensor)),
        *((key, value) for key, value in kwargs.items() if isinstance(value, Tensor)),
    ]
    x = places[0][1] if len(places) == 1 else None
    if x is None or not x.is_floating_point() or x.dim() < (4 if recipe.cutmix else 1):
        form = "images (N, C, H, W)" if recipe.cutmix else "one floating-point tensor (N, ...)"
        shapes = ", ".join(f"{tuple(value.shape)} of {value.dtype}" for _, value in places) or "no tensor"
        raise DataError(f"mixup and cutmix: expected {form} as the model's only input, found {shapes}.")
    even = len(x) // 2 * 2
    shares = torch.eye(len(x), device=x.device)
    if even:
        timms = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=even, multi_label=True)
        front, among = timms(x[:even].clone(), torch.eye(even, device=x.device))
        x = torch.cat([front, x[even:]]) if even < len(x) else front
        shares[:even, :even] = among
    place = places[0][0]
    if isinstance(place, int):
        return Mixture(((*args[:place], x, *args[place + 1 :]), kwargs), shares)
    return Mixture((args, {**kwargs, place: x}), shares)
