"""Copies of a model, and context managers that change a model's state and restore it, on exceptions too.

`cache_weights` is not a context manager: its change lasts.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from daqconvert.errors import ConversionError, FrozenError
from daqconvert.layers.frozen_site import FrozenSite
from daqconvert.layers.mode import evaluating as evaluating
from daqconvert.layers.mode import in_mode as in_mode
from daqconvert.layers.site import QuantizedSite
from daqconvert.quantizers import WeightQuantizer
from daqconvert.quantizers.base import Quantizer, other_form
from daqconvert.seeding import preserved_random_state, seed_generators

MISFIT = 0.5  # relative error of a weight of 3 bits or more whose bounds are not its own


def copy_model(model: nn.Module, *, to_look_at: bool = False, sharing: Iterable[Tensor] = ()) -> nn.Module:
    """Return a deep copy of a model.

    Tensors that a forward left in an attribute together with their autograd graph (a cached activation, the weight
    that the old `weight_norm` computes) are copied without the graph; `copy.deepcopy` alone refuses them. The copy
    shares the tensors of `sharing` with the model. With `to_look_at` it shares all parameters and has no forward
    hooks: this copy is made for tracing, and what its code does in a trace must not reach the user's model.

    Raises:
        ConversionError: If something in the model cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} if to_look_at else {id(t): t for t in sharing}
    for module in model.modules():
        left = [t for t in tree_leaves(vars(module)) if isinstance(t, Tensor) and t.grad_fn is not None]
        memo |= {id(t): t.detach().clone() for t in left}
    try:
        found = copy.deepcopy(model, memo)
    except Exception as error:  # NOTE: any error, because deepcopy runs the user's __deepcopy__ and __reduce__
        raise ConversionError(
            f"{type(model).__name__} cannot be copied ({error}). daqconvert never changes the model it is given, so "
            "copy.deepcopy(model) has to work: take out what cannot be copied (a lock, a file, a generator)."
        ) from error
    for module in found.modules() if to_look_at else ():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Switch all quantizers of a model off while the context lasts: the model computes in float, with current weights.

    Args:
        model: A quantized model.

    Yields:
        The same model. At the end of the context, on exceptions too, its quantizers are as they were before.

    Raises:
        FrozenError: If the model is frozen, because it then has no float weights.

    Example:
        >>> import daqconvert as dq
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> qmodel, x = dq.quantize(model, w_bits=4, a_bits=4), torch.ones(1, 4)
        >>> with dq.disabled(qmodel):
        ...     bool((qmodel(x) == model(x)).all())
        True
    """
    frozen = [name for name, module in model.named_modules() if isinstance(module, FrozenSite)]
    if frozen:
        raise FrozenError(
            f"disabled: {frozen[0] or 'the model'} is frozen and holds no float weight to compute with. "
            "Use the quantized model it was frozen from, or the original."
        )
    sites = [module for module in model.modules() if isinstance(module, QuantizedSite)]
    before = [site.enabled for site in sites]
    for site in sites:
        site.enabled = False
    try:
        yield model
    finally:
        for site, enabled in zip(sites, before, strict=True):
            site.enabled = enabled


def cache_weights(frozen: nn.Module, enabled: bool = True) -> int:
    """Trade memory for speed: keep the decoded weights of a frozen model, instead of decoding them in every forward.

    A frozen model holds one byte for each weight and decodes a layer's codes whenever the layer computes. This call
    keeps the decoded weights in memory too: 4 bytes for each weight of a float32 model. No result changes. The decoded
    weights are in no state dict, artifact or exported file. They move with `.to()` and `.half()`, and are decoded
    again when a state dict is loaded. If you write into `weight_codes` of a compiled model, call this function again.

    Args:
        frozen: A model from `freeze` or `load`; it is changed in place.
        enabled: False frees the memory again.

    Returns:
        The number of bytes that are kept now, in addition to the model itself.

    Raises:
        FrozenError: If the model holds no frozen layer.

    Example:
        >>> import daqconvert as dq
        >>> qmodel = dq.quantize(nn.Linear(4, 4), w_bits=4, a_bits=None, first=None, last=(4, None))
        >>> frozen = dq.freeze(qmodel)
        >>> dq.cache_weights(frozen), dq.cache_weights(frozen, enabled=False)
        (64, 0)
    """
    sites = [module for module in frozen.modules() if isinstance(module, FrozenSite)]
    if not sites:
        raise FrozenError(
            f"cache_weights: {type(frozen).__name__} has no frozen layer. Call daqconvert.freeze(qmodel) first."
        )
    return sum(site.keep_operand(enabled) for site in sites)


@contextmanager
def unchanged_on_error(sites: Iterable[QuantizedSite]) -> Iterator[None]:
    """Restore the bounds, flags, signs and output scales of these sites if the block raises."""
    sites = list(sites)
    quantizers = [q for site in sites for q in (site.weight_quantizer, site.input_quantizer) if q is not None]
    states = [{key: value.clone() for key, value in q.state_dict().items()} for q in quantizers]
    fits = [vars(quantizer).get("_fitted") for quantizer in quantizers]
    scales = [site.output_scale.detach().clone() for site in sites]
    try:
        yield
    except BaseException:
        for quantizer, state, fit in zip(quantizers, states, fits, strict=True):
            quantizer.load_state_dict(state)
            if isinstance(quantizer, WeightQuantizer):
                quantizer._fitted = fit
        for site, scale in zip(sites, scales, strict=True):
            site.output_scale.data.copy_(scale)
        raise


def fit_weights(sites: dict[str, QuantizedSite]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Set the bounds of weights that have none, or that were changed from outside after their bounds were set.

    Returns the names of the latter, and those of weights that their bounds do not fit although both have changed: it
    cannot be told whether they were trained together, so these bounds stay.
    """
    refitted, unfit = [], []
    for site in sites.values():
        quantizer, weight, name = site.weight_quantizer, site.float_weight(), site.layer_name or "(root)"
        if not isinstance(quantizer, WeightQuantizer) or weight is None:
            continue
        changed = quantizer.needs_fit(weight) if quantizer.ready else True
        if changed:
            refitted += [name] if quantizer.ready else []
            quantizer.initialize(weight)
        elif changed is None and quantizer.bits > 2 and quantizer.relative_error(weight) > MISFIT:
            unfit.append(name)
        elif changed is None:
            quantizer.note_fit(weight)  # trained together
    return tuple(refitted), tuple(unfit)


def quantized_sites(model: nn.Module) -> dict[str, QuantizedSite]:
    """Return the quantized sites of a model (layers and holders of call sites) by dotted name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedSite)}


def float_copy(qmodel: nn.Module) -> nn.Module:
    """Return a copy of a quantized model that computes in float, in evaluation mode and without gradients."""
    found = copy.deepcopy(qmodel)
    for site in quantized_sites(found).values():
        site.enabled = False
    return found.eval().requires_grad_(False)


@contextmanager
def rehearsing(model: nn.Module, seed: int = 0, *, norms_only: bool = False) -> Iterator[nn.Module]:
    """Let a model compute as it does in training, and take everything back that a training forward changes.

    A model that is in training mode computes as it is: a batch norm that you have put in evaluation mode is held, and
    uses its running statistics. A model in evaluation mode computes as `model.train()` makes it. Dropout and the like
    act, with random numbers from `seed`. Afterwards buffers (running statistics, moving averages, the vectors of a
    power iteration), attributes, modes and the random state are what they were.

    A batch norm that is given one value for each channel has no variance, so it uses its running statistics here,
    where training would fail. A synchronized one takes the statistics of its own process.

    Args:
        model: Any module.
        seed: Seed of the random numbers that the forward draws.
        norms_only: Put batch norms alone in training mode, everything else in evaluation mode.

    Yields:
        The same model.

    Example:
        >>> norm = nn.BatchNorm1d(1).eval()
        >>> with rehearsing(norm):
        ...     norm(torch.tensor([[0.0], [2.0]])).tolist()
        [[-0.9999949932098389], [0.9999949932098389]]
        >>> norm.running_mean.item(), norm.training
        (0.0, False)
    """
    everything = list(model.modules())
    held = [(module, dict(vars(module)), dict(module._buffers)) for module in everything]
    tensors = {id(t): t for _, own, buffers in held for t in (*own.values(), *buffers.values()) if _has_values(t)}
    values = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    generators = [value for _, own, _ in held for value in own.values() if isinstance(value, torch.Generator)]
    by_itself = not model.training
    handles = []
    with preserved_random_state(*generators):
        try:
            _begin_training(model, norms_only)
            for norm in everything:
                if isinstance(norm, _BatchNorm) and norm.training:
                    handles.append(norm.register_forward_pre_hook(_hold_where_single, with_kwargs=True))
                    if isinstance(norm, SyncBatchNorm):
                        vars(norm)["forward"] = types.MethodType(_BatchNorm.forward, norm)
            seed_generators(seed, devices=True)
            yield model
        finally:
            for handle in handles:
                handle.remove()
            if by_itself and not norms_only:
                model.eval()  # what `train` of a module of its own has done is undone by its `eval`
            _take_back(held, tensors, values)


def _begin_training(model: nn.Module, norms_only: bool) -> None:
    """Put a model in training mode, unless it is; with `norms_only`, its batch norms that are not held."""
    if not norms_only:
        if not model.training:
            model.train()
        return
    by_itself = not model.training
    for module in model.modules():
        module.training = isinstance(module, _BatchNorm) and (module.training or by_itself)


def _hold_where_single(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = args[0] if args else kwargs["input"]
    norm.training = x.numel() > x.shape[1]


def _has_values(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return plain and not value.is_meta and not is_lazy(value)


@torch.no_grad()
def _take_back(held: list[Any], tensors: dict[int, Tensor], values: dict[int, Tensor]) -> None:
    """Give modules their attributes and buffers back, and these the values that they had."""
    for module, own, buffers in held:
        vars(module).clear()
        vars(module).update(own)
        module._buffers.clear()
        module._buffers.update(buffers)
    for key, tensor in tensors.items():
        if not torch.equal(tensor, values[key]):  # another write would count as a change, of which autograd complains
            tensor.copy_(values[key])


def check_before_loading(model: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
    """Refuse a state dict whose bounds are of another form, before any of it is loaded.

    `quantize` makes this a hook of the model (`register_load_state_dict_pre_hook`), so that it is called whichever
    module around the model loads the state dict: a DDP or an average of weights, with their prefixes.

    Raises:
        ConversionError: If bits, grid, normalization or granularity differ; the message names the layers.
    """
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            problem = module.misfit(state_dict, f"{prefix}{name}.")
            problems += [problem] if problem else []
    if problems:
        raise ConversionError(other_form(problems))
    given = {key.rpartition(".")[0] for key in state_dict}
    for name, site in quantized_sites(model).items():  # weights that are loaded without bounds leave these unfitted
        bounds = f"{prefix}{name}.weight_quantizer".replace("..", ".").removeprefix(".")
        if isinstance(site.weight_quantizer, WeightQuantizer) and bounds not in given:
            weight = site.float_weight()
            if weight is not None and not weight.is_meta and site.weight_quantizer.needs_fit(weight) is None:
                site.weight_quantizer.note_fit(weight)


def note_after_loading(model: nn.Module, *args: Any) -> None:
    """Note that bounds which were loaded belong to the weights that were; a hook of the model, as the other one."""
    for site in quantized_sites(model).values():
        quantizer, weight = site.weight_quantizer, site.float_weight()
        if isinstance(quantizer, WeightQuantizer) and weight is not None and not quantizer.knows_fit:
            quantizer.note_fit(weight)
