"""Which parameters are trained by which optimizer, and which of them decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from daqconvert.posttraining import bounds_and_scales
from daqconvert.training.patterns import matching
from daqconvert.training.recipes import Recipe

WEIGHTS, QUANTIZERS = "weights", "quantizers"


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return the trainable parameters by group, `"weights"` and `"quantizers"`, each by dotted name.

    Args:
        model: A quantized model.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Sequential(nn.Linear(4, 2)), w_bits=4, a_bits=4)
        >>> {group: sorted(named) for group, named in parameter_groups(qmodel).items()}["weights"]
        ['0.bias', '0.weight']
    """
    own = bounds_and_scales(model)
    groups: dict[str, dict[str, nn.Parameter]] = {WEIGHTS: {}, QUANTIZERS: {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[QUANTIZERS if parameter in own else WEIGHTS][name] = parameter
    return groups


def undecayed(model: nn.Module, recipe: Recipe) -> set[str]:
    """Return the names of the parameters that `no_decay` spares.

    Args:
        model: A quantized model.
        recipe: Gives `no_decay`.

    Raises:
        TrainingError: If a pattern matches no parameter; names the nearest.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return set(matching(recipe.no_decay, names, "no_decay", "parameter"))


def decay_groups(group: str, named: dict[str, nn.Parameter], recipe: Recipe, spared: set[str]) -> list[dict[str, Any]]:
    """Return the parameter groups of one optimizer: what decays, then what does not.

    Of the weights with `decay = "weights"` all that have fewer than two dimensions (biases, norms) do not.

    Args:
        group: `"weights"` or `"quantizers"`.
        named: Its parameters.
        recipe: Gives `decay` and both weight decays.
        spared: From `undecayed`.
    """
    split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    amount = recipe.weight_decay if group == WEIGHTS else recipe.quantizer_weight_decay
    for name, parameter in named.items():
        by_kind = group == QUANTIZERS or recipe.decay == "all" or parameter.dim() >= 2
        split[by_kind and name not in spared].append(parameter)
    return [
        {"params": parameters, "weight_decay": amount if decays else 0.0}
        for decays, parameters in split.items()
        if parameters
    ]
