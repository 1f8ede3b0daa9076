"""Feature distillation: outputs of named modules are drawn towards the teacher's.

    loss = mean over the features f of  mean((s_f - t_f)^2) / mean(t_f^2)

where `s_f` and `t_f` are the first tensors that module `f` returns in student and teacher, in float32. At a loss of 1
the difference is as large as the teacher's output.

A recipe names the modules in `features`; `"auto"` means the blocks and the layers between them
(`posttraining.block_names`), except those that the teacher lacks or calls differently.

Hooks collect the tensors. They are attached at the first step and stay until `close`, because `torch.compile` looks at
hooks only when it compiles. A model that was compiled and has run before the first step is refused with a message. The
hooks record nothing outside of a training step and break no graph; in a copy or a pickle of the model they do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from daqconvert.errors import TrainingError
from daqconvert.posttraining import block_names
from daqconvert.quantizers.base import Quantizer
from daqconvert.training.patterns import matching
from daqconvert.training.recipes import Recipe

AUTO = "auto"


def feature_names(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return the names of the modules that `features` of a recipe means in the model in training.

    A pattern that matches no module is a `TrainingError`, whose message says the nearest name.

    Example:
        >>> feature_names(Recipe(features=("1", "0*")), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        ['0', '1']
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # quantizers are left out: a teacher has none
    names = [name for name, module in modules.items() if name and not isinstance(module, Quantizer)]
    named = set(matching([f for f in recipe.features if f != AUTO], names, "features", "module"))
    if AUTO in recipe.features:
        named.update(block_names(model))
    return [name for name in names if name in named]


def optional_names(recipe: Recipe, model: nn.Module) -> set[str]:
    """Return the names of the features that `"auto"` adds to those that the user named.

    They are skipped if the teacher lacks them or calls them differently; for a feature that the user named, this is an
    error.
    """
    if AUTO not in recipe.features:
        return set()
    written = tuple(feature for feature in recipe.features if feature != AUTO)
    return set(block_names(model)) - set(feature_names(recipe.replace(features=written), model))


class Collector:
    """Collects the outputs of named modules while it is recording; its hooks are on the model until `close`."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names, self.recording = model, names, False
        self.found: dict[str, list[Any]] = {}
        self._handles: list[RemovableHandle] = [
            model.get_submodule(name).register_forward_hook(_Hook(self, name)) for name in names
        ]

    def start(self) -> None:
        """Forget what was found, and record from now on."""
        self.found, self.recording = {}, True

    def take(self) -> dict[str, list[Any]]:
        """Stop recording; return the outputs of each module, one for each of its calls."""
        found, self.found, self.recording = self.found, {}, False
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.found, self.recording = [], {}, False


class _Hook:
    """A forward hook that knows the name of its module; a copy of it does nothing."""

    def __init__(self, collector: Collector | None = None, name: str = "") -> None:
        self.collector, self.name = collector, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.collector is not None and self.collector.recording:
            self.collector.found.setdefault(self.name, []).append(output)

    def __reduce__(self) -> Any:  # copies and pickles of the model have no part in the run
        return _Hook, ()


def called_alike(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], name: str) -> bool:
    """Return whether student and teacher called a module equally often, and got tensors of the same shapes."""
    shapes = [[_shape(output) for output in found.get(name, ())] for found in (ours, theirs)]
    return bool(shapes[0]) and shapes[0] == shapes[1] and None not in shapes[0]


def _first(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output, None if there is none."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def _shape(output: Any) -> torch.Size | None:
    """Return the shape of the first tensor of a module's output, None if it is not floating-point."""
    tensor = _first(output)
    return tensor.shape if tensor is not None and tensor.is_floating_point() else None


def feature_loss(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], names: list[str]) -> Tensor:
    """Return the feature loss; `ours` and `theirs` hold, by name, the outputs of each call in student and teacher.

    A feature that is called several times counts as the mean over its calls.

    Raises:
        TrainingError: If a module was not called, or not as often as in the teacher, or returned something else than a
            floating-point tensor of the teacher's shape.

    Example:
        >>> t = torch.tensor([1.0, 2.0])
        >>> feature_loss({"a": [t * 0.5]}, {"a": [t]}, ["a"]).item()
        0.25
    """
    losses = []
    for name in names:
        if not ours.get(name) or len(ours[name]) != len(theirs.get(name, ())):
            raise TrainingError(
                f"features: {name!r} was called {len(ours.get(name, ()))} times by the model and "
                f"{len(theirs.get(name, ()))} times by the teacher. Name a module that both call alike; if the model "
                "was compiled and ran before, call torch.compiler.reset() first, for hooks are not seen later."
            )
        for student, teacher in zip(ours[name], theirs[name], strict=True):
            s, t = _tensor(student, name, "model"), _tensor(teacher, name, "teacher")
            if s.shape != t.shape:
                raise TrainingError(
                    f"features: {name!r} returns shape {tuple(s.shape)} in the model, {tuple(t.shape)} in the "
                    "teacher. Name modules of equal outputs."
                )
            scale = t.square().mean().clamp(min=torch.finfo(t.dtype).tiny)
            losses.append((s - t).square().mean() / scale / len(ours[name]))
    return torch.stack(losses).sum() / len(names)


def _tensor(output: Any, name: str, who: str) -> Tensor:
    """Return the first tensor of a module's output, in float32 or float64."""
    tensor = _first(output)
    if tensor is None or not tensor.is_floating_point():
        found = f"a {type(output).__name__}" if tensor is None else f"a tensor of {tensor.dtype}"
        raise TrainingError(f"features: {name!r} of the {who} returned {found}; expected a floating-point tensor.")
    return tensor if tensor.dtype == torch.float64 else tensor.float()
