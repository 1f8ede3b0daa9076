"""How a skeleton, a float model of the saved structure, is made ready for the values of an artifact.

The sites of the stored plan become empty frozen layers, and every key, shape, dtype and number of bits must match the
artifact's.

An artifact holds no code. A forward with call sites, which multiplies by calling functions, was rewritten when the
model was quantized. When the artifact is loaded, this forward is rewritten again, from the library that is installed
then. If the library has changed since, the forward may compute something else, so the manifest holds a hash of the
source of each rewritten forward.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from daqconvert.artifact.manifest import Manifest, TensorEntry, shown, told
from daqconvert.errors import ArtifactError, DaqError
from daqconvert.functional.grid import intervals
from daqconvert.graph import apply_sites
from daqconvert.graph.rewrite import Rewritten
from daqconvert.kept_plan import keep_plan
from daqconvert.layers.frozen_site import BUFFERS, FrozenSite
from daqconvert.layers.lookup import quantized_class
from daqconvert.spec import PlanRow


def fit(skeleton: nn.Module, manifest: Manifest, where: str) -> nn.Module:
    """Turn a skeleton of any dtype, in place, into a frozen model with places for the artifact's values.

    Raises:
        ArtifactError: If a layer, shape, dtype or number of bits differs; the message begins with `where` and names
            it.
    """
    rows = manifest.plan.converted
    if type(skeleton).__name__ != manifest.model and "" not in (row.name for row in rows):
        raise ArtifactError(f"{where}: model: expected a {manifest.model}, found a {type(skeleton).__name__}.")
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    owners: dict[int, str] = {}
    for row in rows:
        if row.site.is_output:
            continue  # an output quantizer: whether there is a module for it turns out when it is added
        layer = modules.get(row.name)
        if row.site.call is None or layer is not None:
            _check_site(layer, row, where)
        if layer is not None and owners.setdefault(id(layer), row.name) != row.name:
            raise ArtifactError(f"{where}: plan: {shown(row.name)} is a second name of {shown(owners[id(layer)])}.")
    dtype = getattr(torch, manifest.dtype)
    if any(p.dtype != dtype for p in skeleton.parameters() if p.is_floating_point()):
        skeleton = skeleton.to(dtype)
    try:
        apply_sites(skeleton, rows, frozen=True)
    except (DaqError, RuntimeError, AttributeError, KeyError, IndexError, TypeError, AssertionError) as error:
        raise ArtifactError(f"{where}: plan: {told(error)}") from error
    for module in skeleton.modules():
        module.training = False
    keep_plan(skeleton, manifest.plan)
    _check_forwards(skeleton, manifest.forwards, where)
    _check_keys(skeleton, manifest, where)
    return skeleton


def _check_site(layer: nn.Module | None, row: PlanRow, where: str) -> None:
    place = f"{where}: plan: {shown(row.name) if row.name else '(root)'}"
    known = layer is not None and (row.site.call is not None or quantized_class(type(layer)) is not None)
    # a layer that was parametrized may be plain in the skeleton, and the other way round: only its weight is stored
    kinds = row.site.kind, f"Parametrized{row.site.kind}", row.site.kind.removeprefix("Parametrized")
    if layer is None or type(layer).__name__ not in kinds or not known:
        found = "no such layer" if layer is None else f"a {type(layer).__name__}"
        raise ArtifactError(f"{place}: expected a float {shown(row.site.kind)[1:-1]}, found {found}.")
    shape = tuple(getattr(getattr(layer, "weight", None), "shape", ()))
    if shape != row.site.weight_shape:
        raise ArtifactError(f"{place}: expected a weight of shape {row.site.weight_shape}, found {shape}.")


def _check_keys(frozen: nn.Module, manifest: Manifest, where: str) -> None:
    wanted, entries = frozen.state_dict(), manifest.tensors
    own = {
        f"{name}.{buffer}".lstrip("."): module.settings.w_bits if buffer == "weight_codes" else None
        for name, module in frozen.named_modules(remove_duplicate=False)
        if isinstance(module, FrozenSite)
        for buffer in BUFFERS
    }
    problems = [f"{key} is missing in the artifact" for key in wanted if key not in entries]
    problems += [f"{shown(key)} is not in the model" for key in entries if key not in wanted]
    for key in wanted.keys() & entries.keys():
        entry, stored = entries[key], entries[entries[key].same_as or key]
        problem = _misfit(wanted[key], entry, exact=key in own)
        if stored.bits != own.get(key):
            problem = f"expected {own.get(key) or 'no'} bits of packed codes, found {stored.bits or 'none'}"
        problems += [f"{key}: {problem}"] if problem else []
    if problems:
        raise ArtifactError(f"{where}: tensors: do not fit {type(frozen).__name__}: {'; '.join(problems[:3])}.")


def _misfit(value: object, entry: TensorEntry, exact: bool) -> str:
    """Return what is wrong with a tensor, `""` if nothing; unless `exact`, any floating-point dtype will do."""
    if not isinstance(value, Tensor):
        return "the model holds no tensor there"
    if tuple(value.shape) != entry.shape:
        return f"the model has shape {tuple(value.shape)}, the artifact {entry.shape}"
    dtype = getattr(torch, entry.dtype)
    if dtype == value.dtype or (not exact and dtype.is_floating_point and value.is_floating_point()):
        return ""
    return f"the model has {str(value.dtype)[6:]}, the artifact {entry.dtype}"


def check_values(frozen: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise if a code or zero point for a model from `fit` has more bits than its layer allows.

    Raises:
        ArtifactError: If a code or zero point is too large; the message begins with `where` and names the tensor.
    """
    for name, module in frozen.named_modules():
        if not isinstance(module, FrozenSite):
            continue
        w_bits, a_bits = module.settings.w_bits, module.settings.a_bits
        tops = {}
        if w_bits is not None:
            tops["weight_codes"] = intervals(w_bits, module.settings.grid)
        if a_bits is not None:
            tops["input_zero_point"] = 2**a_bits - 1
        if "weight_scale" in module._buffers and w_bits is not None:
            tops = {"input_zero_point": tops["input_zero_point"]} if a_bits is not None else {}
            tops["weight_zero_point"] = 2**w_bits - 1
        for buffer, top in tops.items():
            key = f"{name}.{buffer}".lstrip(".")
            if state[key].numel() and int(state[key].max()) > top:
                raise ArtifactError(f"{where}: {key}: expected 0 to {top}, found {int(state[key].max())}.")


def forward_hashes(model: nn.Module) -> dict[str, str]:
    """Return the SHA-256 of the source of each rewritten forward of a frozen model, by the full name of its class.

    A class without source code (one that was typed into an interpreter) is left out. Names are sorted.
    """
    classes = {_original(type(m)) for m in model.modules() if isinstance(m, Rewritten)}
    found = {}
    for cls in classes:
        try:
            source = textwrap.dedent(inspect.getsource(cls.forward))
        except (OSError, TypeError):
            continue
        found[f"{cls.__module__}.{cls.__qualname__}"] = hashlib.sha256(source.encode()).hexdigest()
    return dict(sorted(found.items()))


def _check_forwards(model: nn.Module, stored: Mapping[str, str], where: str) -> None:
    """Raise if a forward that is rewritten now is not the one whose hash was stored.

    Raises:
        ArtifactError: If it is another; the message begins with `where` and names the class and its library.
    """
    for name, digest in forward_hashes(model).items():
        if stored.get(name) != digest:
            library = name.partition(".")[0]
            what = "has another forward here" if name in stored else "is not among those that were rewritten then"
            raise ArtifactError(
                f"{where}: forwards: {name} {what}: {library} has changed since the artifact was saved, and may "
                f"compute something else. Install the {library} it was made with, or freeze and save the model again."
            )


def _original(cls: type[nn.Module]) -> type[nn.Module]:
    found: type[nn.Module] = getattr(cls, "original", cls)
    return found
