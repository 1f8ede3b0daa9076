"""How the model of an artifact is rebuilt: from its name in timm or torchvision and from arguments that do no harm.

An artifact may come from anybody. So its source is a name, never an import path, and an argument is a number, a text
of letters and digits, or a list of these. `save` and `load` both refuse arguments that make a builder read a file, use
the network or choose a device. A model is first built on torch's `meta` device, where tensors take no memory, in a
limited number of steps; only one that fits the stored tensors is then built with values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from daqconvert.errors import ArtifactError, DaqError
from daqconvert.sources import build_model, parse_source

# An argument is refused if its name, split at "_", holds one of these words ...
REFUSED_WORDS = frozenset(
    "cache cfg checkpoint config custom device dir dtype file filename fn hf hub load path pretrained pruned repo "
    "state url uri weights".split()
)
# ... unless the whole name is one of these, which only shape the model.
HARMLESS = frozenset(
    "bbox_reg_weights block_config bn_weight_init drop_path init_weights pretrained_window_size "
    "pretrained_window_sizes state_dim transformer_drop_path use_checkpoint".split()
)
LARGEST_NUMBER = 4096  # in arguments; a size of a stored tensor allows larger ones (num_classes=21843)
MOST_VALUES = 256  # in all arguments together
STEPS, STEPS_PER_TENSOR = 5_000, 200  # torch calls that a builder may make; timm's make at most 30 per tensor
SPARE_ELEMENTS = 1 << 26  # for buffers that are not stored (attention masks), besides 8 per stored element


def check_source(source: str | None, kwargs: Mapping[str, Any], largest: int) -> None:
    """Raise unless a model may be rebuilt from this source (None: from a skeleton) with these arguments.

    `largest` is the largest size in the shapes of the stored tensors.

    Raises:
        ArtifactError: If the source or an argument is refused; the message names it.
    """
    if source is None:
        if kwargs:
            raise ArtifactError("source_kwargs: have no effect without source.")
        return
    try:
        trusted = len(source) <= 200 and parse_source(source).is_trusted_name
    except DaqError:
        trusted = False
    if not trusted:
        raise ArtifactError(
            f"source: {source[:80]!a}: an artifact names only timm:NAME or torchvision:NAME, which load can "
            "rebuild without running code from the file. Save without source, and pass load(path, model=...)."
        )
    counted = [0]
    for name, value in kwargs.items():
        words = set(name.split("_")) if isinstance(name, str) else {"path"}
        if not re.fullmatch(r"[a-z]\w{0,60}", str(name), re.ASCII) or (words & REFUSED_WORDS and name not in HARMLESS):
            raise ArtifactError(
                f"source_kwargs.{ascii(name)[1:41]}: an artifact passes a builder no argument of this name: it could "
                "read a file, use the network or choose a device. Save without source, and pass load(path, model=...)."
            )
        _check_value(f"source_kwargs.{name}", value, max(LARGEST_NUMBER, largest), counted, depth=0)


def _check_value(where: str, value: object, largest: int, counted: list[int], depth: int) -> None:
    counted[0] += 1
    if counted[0] > MOST_VALUES or depth > 4:
        raise ArtifactError(f"{where}: expected at most {MOST_VALUES} values in lists of at most 4 levels.")
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_value(f"{where}[{i}]", item, largest, counted, depth + 1)
    elif isinstance(value, str):
        if not re.fullmatch(r"[\w\-+]{0,64}", value, re.ASCII):
            raise ArtifactError(f"{where}: expected a text of letters, digits, _ - +, found {value[:60]!a}.")
    elif isinstance(value, int | float):
        if abs(value) > largest or not math.isfinite(value):  # in this order: an integer may be too large for a float
            raise ArtifactError(
                f"{where}: {ascii(value)[:40]} is neither up to {LARGEST_NUMBER} nor up to the largest size of a "
                f"stored tensor ({largest})."
            )
    elif value is not None:
        raise ArtifactError(f"{where}: expected a number, text, boolean, null or list, found {ascii(value)[:60]}.")


class _Budget(TorchFunctionMode):
    """Counts this thread's torch calls and the elements they make, and stops a builder that makes too many."""

    def __init__(self, steps: int, elements: float) -> None:
        super().__init__()
        self.steps, self.elements = steps, elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.steps -= 1
        if func is torch.empty and isinstance(result, Tensor):
            self.elements -= result.numel()
        if self.steps < 0 or self.elements < 0:
            raise ArtifactError("it is larger than the stored tensors")
        return result


def outline(source: str, kwargs: Mapping[str, Any], tensors: int, elements: int) -> nn.Module:
    """Build a model on the `meta` device; the numbers of stored tensors and elements limit the steps of its builder.

    Source and arguments have passed `check_source`. A few builders compute with real tensors and cannot work on `meta`
    (torchvision's RegNets): their models are built with values, and the number of elements is limited as well.

    Raises:
        ArtifactError: If it cannot be built, or its buffers outside the state dict are too large for these elements.
    """
    steps, most = STEPS + STEPS_PER_TENSOR * tensors, 8 * elements + SPARE_ELEMENTS
    try:
        with torch.device("meta"), _Budget(steps, math.inf):
            model = _build(source, kwargs)
    except ArtifactError as error:
        if not _needs_values(error):
            raise
        with _Budget(steps, most):
            model = _build(source, kwargs)
    stored = set(model.state_dict())
    beside = sum(buffer.numel() for name, buffer in model.named_buffers() if name not in stored)
    if beside > most:
        raise ArtifactError(f"source: with these source_kwargs it has {beside} elements beside its state dict.")
    return model


def build(source: str, kwargs: Mapping[str, Any], tensors: int) -> nn.Module:
    """Build the model with values, after `outline` has shown that it fits; raises `ArtifactError` if that fails."""
    with _Budget(STEPS + STEPS_PER_TENSOR * tensors, math.inf):
        return _build(source, kwargs)


def _build(source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # values are overwritten: the user's generator must not advance
        try:
            return build_model(source, pretrained=False, **kwargs)
        except (DaqError, TypeError) as error:
            raise ArtifactError(f"source: it could not be built here ({str(error)[:300]}).") from error


def _needs_values(error: BaseException | None) -> bool:
    """Whether a builder failed because a `meta` tensor has no values; torch says so in two ways."""
    return error is not None and ("meta tensor" in str(error) or _needs_values(error.__cause__))
