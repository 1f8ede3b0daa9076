"""Feature distillation: outputs of named modules are drawn towards the teacher's.

    loss = mean over the features f of  mean((s_f - t_f)^2) / mean(t_f^2)

with the first tensor that a module returns, in float32: at 1 the difference is as large as the teacher's output.

Hooks collect these tensors. They are attached at the first step and stay until `close`, because `torch.compile` looks
at hooks when it compiles and not again: a model that was compiled and has run before that is refused with a message.
They record nothing outside of a training step, break no graph, and a copy or a pickle of the model has inert ones.

Which outputs teach a network that nobody has named any of: its blocks'.

A block is an innermost module with two quantized layers or more below it, as a residual block, an inverted residual,
an attention or an MLP. Layers outside of all blocks count too, but for the first, which sees what the teacher's sees,
and the last, whose output are the logits.
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
    """Return the modules of a model that `features` means.

    Args:
        recipe: Gives names, globs and `re:` patterns, or `"auto"`: the blocks that `block_names` finds.
        model: The model in training.

    Raises:
        TrainingError: If one of them matches no module; names the nearest.

    Example:
        >>> feature_names(Recipe(features=("1", "0*")), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        ['0', '1']
    """
    modules = dict(model.named_modules(remove_duplicate=False))  # a teacher calls no quantizer
    names = [name for name, module in modules.items() if name and not isinstance(module, Quantizer)]
    named = set(matching([f for f in recipe.features if f != AUTO], names, "features", "module"))
    if AUTO in recipe.features:
        named.update(block_names(model))
    return [name for name in names if name in named]


def optional_names(recipe: Recipe, model: nn.Module) -> set[str]:
    """Return those of them that nobody wrote: without them in the teacher, or called otherwise there, they are left.

    Args:
        recipe: As for `feature_names`.
        model: Likewise.
    """
    if AUTO not in recipe.features:
        return set()
    written = tuple(feature for feature in recipe.features if feature != AUTO)
    return set(block_names(model)) - set(feature_names(recipe.replace(features=written), model))


class Collector:
    """Outputs of named modules, while it is recording.

    Args:
        model: Has the modules; hooks are attached to it until `close`.
        names: Of the modules.
    """

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
        """Stop recording; return what the modules returned, each call of one."""
        found, self.found, self.recording = self.found, {}, False
        return found

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.found, self.recording = [], {}, False


class _Hook:
    """A forward hook that knows its module's name; a copy of it does nothing."""

    def __init__(self, collector: Collector | None = None, name: str = "") -> None:
        self.collector, self.name = collector, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.collector is not None and self.collector.recording:
            self.collector.found.setdefault(self.name, []).append(output)

    def __reduce__(self) -> Any:  # of copies and pickles: they have no part in the run
        return _Hook, ()


def called_alike(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], name: str) -> bool:
    """Return whether student and teacher called a module equally often, and got tensors of the same shapes.

    Args:
        ours: Outputs of the student by name, each call of it.
        theirs: Of the teacher.
        name: Of the module.
    """
    shapes = [[_shape(output) for output in found.get(name, ())] for found in (ours, theirs)]
    return bool(shapes[0]) and shapes[0] == shapes[1] and None not in shapes[0]


def _first(output: Any) -> Tensor | None:
    """The first tensor of a module's output."""
    return next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)


def _shape(output: Any) -> torch.Size | None:
    """Its shape, or None where it is none of floating point."""
    tensor = _first(output)
    return tensor.shape if tensor is not None and tensor.is_floating_point() else None


def feature_loss(ours: dict[str, list[Any]], theirs: dict[str, list[Any]], names: list[str]) -> Tensor:
    """Return the loss above.

    Args:
        ours: Outputs of the student by name, each call of it.
        theirs: Of the teacher.
        names: The features; each is a mean over its calls.

    Raises:
        TrainingError: If a module was not called, returned no floating-point tensor, or of another shape than the
            teacher's.

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
    """The first tensor of a module's output, in float32 (float64 stays)."""
    tensor = _first(output)
    if tensor is None or not tensor.is_floating_point():
        found = f"a {type(output).__name__}" if tensor is None else f"a tensor of {tensor.dtype}"
        raise TrainingError(f"features: {name!r} of the {who} returned {found}; expected a floating-point tensor.")
    return tensor if tensor.dtype == torch.float64 else tensor.float()
