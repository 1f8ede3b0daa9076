"""Recording the input codes and outputs of a model's layers; the model is a torch module or a file made by `export`.

A frozen layer of integer deployment also computes the batch norm and the activation that follow it, its *epilogue*.
So that outputs can be compared, the output of the same layer in a float or quantized model is recorded after the
epilogue. A file of integer form says in its metadata what its layers have folded in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from daqconvert.batches import model_device, to_device
from daqconvert.convert import PLAN_ATTRIBUTE
from daqconvert.deploy.onnx.expansion import layer_tensors
from daqconvert.deploy.onnx.lowering import named_layers
from daqconvert.deploy.onnx.runtime import OnnxModel, require_packages
from daqconvert.deploy.signature import output_tensors
from daqconvert.layers import FrozenSite, QuantizedSite
from daqconvert.layers.integer_layers import folded_numbers, folds
from daqconvert.layers.site import Operation, Watcher, watching
from daqconvert.models import evaluating
from daqconvert.quantizers import InputQuantizer
from daqconvert.spec import SiteOutput

Calls = dict[str, list[Tensor]]


@dataclass
class Recording:
    """What one forward was seen to compute.

    Attributes:
        results: The model's output tensors, on the CPU.
        codes: Input codes of each quantized layer, uint8, one tensor per call, in the order of execution; where the
            weight depends on the data, its codes follow those of the input.
        outputs: Outputs of each layer, one tensor per call, in the order of execution.
        after: Layers whose outputs were recorded after their epilogue.
    """

    results: list[Tensor]
    codes: Calls = field(default_factory=dict)
    outputs: Calls = field(default_factory=dict)
    after: frozenset[str] = frozenset()


class Probe(Protocol):
    """A model that can be run while its layers are watched."""

    def layers(self) -> list[str]:
        """Return the names of the layers that can be watched."""
        ...

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: set[str]) -> Recording:
        """Run the model on these arguments and record the layers named in `watch`."""
        ...


class ModuleProbe:
    """Watches a torch model, float, quantized or frozen, in evaluation mode.

    Attributes:
        epilogues: Name of a layer -> the batch norm and activation after which its output is recorded, because the
            other model of the comparison has folded them into this layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = named_layers(model)
        self.epilogues: dict[str, SiteOutput] = {}

    def layers(self) -> list[str]:
        """Return the names of all convolutions and linears."""
        return list(self.modules)

    def run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: set[str], forced: Calls | None = None
    ) -> Recording:
        """Run the model on these arguments and record the layers named in `watch`.

        `forced` holds input codes by the name of a frozen layer, one tensor per call. The layer computes with them
        instead of its own codes. Its own codes are recorded all the same: they show what the layers before it make of
        the forced codes.
        """
        recording, device = Recording([]), model_device(self.model)
        with ExitStack() as stack:
            for name in watch & self.modules.keys():
                module = self.modules[name]
                if isinstance(module, (QuantizedSite, FrozenSite)):
                    recorder = _Recorder(recording, name, (forced or {}).get(name))
                    stack.enter_context(watching(module, recorder))
                else:
                    stack.callback(module.register_forward_hook(_output_hook(recording.outputs, name)).remove)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.no_grad())
            result = self.model(*to_device(args, device), **to_device(kwargs, device))
        modules, own = dict(self.model.named_modules()), epilogues(self.model).keys()
        recording.after = frozenset((self.epilogues.keys() | own) & recording.outputs.keys())
        for name in recording.after - own:
            recording.outputs[name] = [_after(modules, self.epilogues[name], y) for y in recording.outputs[name]]
        recording.results = [tensor.cpu() for tensor in output_tensors(result)]
        return recording


class _Recorder(Watcher):
    """Records one site; if it is frozen and `forced` is not None, makes it compute with those codes."""

    def __init__(self, recording: Recording, name: str, forced: list[Tensor] | None) -> None:
        self.recording, self.name, self.forced = recording, name, forced

    def before(self, site: Any, x: Tensor, weight: Tensor | None, operation: Operation) -> Tensor:
        own, of_weight = _input_codes(site, x), _weight_codes(site, weight)
        found = [codes.cpu() for codes in (own, of_weight) if codes is not None]
        calls = self.recording.codes.setdefault(self.name, []) if found else []
        at = len(calls)
        calls += found
        if own is None or self.forced is None or not isinstance(site, FrozenSite):
            return x
        # NOTE: exact: quantizing (code - zero_point) * scale gives the same code again
        forced = _real_values(self.forced[at].to(own.device), site.input_scale, site.input_zero_point)
        return torch.empty_like(x).copy_(forced)  # in the layout of `x`, which picks the kernel

    def after(self, site: Any, y: Tensor) -> None:
        self.recording.outputs.setdefault(self.name, []).append(y.detach().cpu().clone())  # cloned: `+=` may follow


def _real_values(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return `(codes - zero_point) * scale` in the dtype of the scale."""
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale


def _input_codes(module: nn.Module, x: Tensor) -> Tensor | None:
    if isinstance(module, FrozenSite):
        return module.input_codes(x) if module.settings.a_bits is not None else None
    if isinstance(module, QuantizedSite) and module.enabled and module.input_quantizer is not None:
        return module.input_quantizer.codes(x)
    return None


def _weight_codes(module: nn.Module, weight: Tensor | None) -> Tensor | None:
    """Return the codes of a weight that depends on the data; None for any other weight."""
    if isinstance(module, FrozenSite) and "weight_scale" in module._buffers:
        return (module.weight_operand(weight) + module.weight_zero_point).to(torch.uint8)
    if isinstance(module, QuantizedSite) and module.enabled and isinstance(module.weight_quantizer, InputQuantizer):
        return None if weight is None else module.weight_quantizer.codes(weight)
    return None


def _output_hook(outputs: Calls, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, []).append(output.detach().cpu())

    return hook


class OnnxProbe:
    """Watches an ONNX file, in ONNX Runtime.

    The results are those of the file itself. Codes and outputs of layers are read from copies in memory whose graph
    has them as further outputs. Codes and outputs have a session each, because a layer whose output is read is not
    fused.

    Attributes:
        tensors: Per layer, the names of its `"codes"` and `"outputs"`.
        epilogues: What the file's integer layers compute besides their products, by the name of the layer; None for a
            layer of a file that does not say it, because an earlier version wrote it.

    Args:
        source: Path of the file, or its bytes.
        kinds: What to watch: `"codes"`, `"outputs"`, or both.
    """

    def __init__(self, source: str | Path | bytes, kinds: Iterable[str] = ("codes", "outputs")) -> None:
        require_packages(["onnx", "onnxruntime"])
        import onnx

        self._file = OnnxModel(source)
        self._proto = onnx.load_from_string(source if isinstance(source, bytes) else Path(source).read_bytes())
        self.tensors = layer_tensors(self._file.metadata)
        self.epilogues = _file_epilogues(self._file.metadata, self.tensors)
        self._kinds = tuple(kinds)
        self._sessions: dict[tuple[str, frozenset[str]], OnnxModel] = {}

    def layers(self) -> list[str]:
        """Return the names of the frozen layers."""
        return list(self.tensors)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], watch: set[str]) -> Recording:
        """Run the file and record the layers named in `watch`."""
        recording = Recording(self._file.run(args, kwargs))
        names = frozenset(watch & self.tensors.keys())
        recording.after = names & self.epilogues.keys()
        for kind, calls in (("codes", recording.codes), ("outputs", recording.outputs)):
            if kind not in self._kinds or not any(self.tensors[name][kind] for name in names):
                continue
            session = self._watching(kind, names)
            found = dict(zip(session.output_names, session.run(args, kwargs), strict=True))
            for name in (n for n in self.tensors if n in names):  # in the order of execution
                if self.tensors[name][kind]:
                    calls[name] = [self._real(name, kind, tensor, found) for tensor in self.tensors[name][kind]]
        return recording

    def _real(self, name: str, kind: str, tensor: str, found: dict[str, Tensor]) -> Tensor:
        """Return a recorded tensor; a layer's output that the file holds as codes is returned in real units."""
        grid = self.tensors[name].get("grids", {}).get(tensor) if kind == "outputs" else None
        value = found[tensor]
        if grid is None:
            return value
        scale, zero_point = grid
        return _real_values(value, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point))

    def _watching(self, kind: str, names: frozenset[str]) -> OnnxModel:
        """Return a session whose graph has the tensors of these layers as outputs."""
        import onnx

        if (kind, names) not in self._sessions:
            model = onnx.ModelProto()
            model.CopyFrom(self._proto)
            there = set(self._file.output_names)
            for name in (n for n in self.tensors if n in names):
                for tensor in self.tensors[name][kind]:
                    codes = kind == "codes" or tensor in self.tensors[name].get("grids", {})
                    dtype = onnx.TensorProto.UINT8 if codes else onnx.TensorProto.FLOAT
                    if tensor not in there:
                        model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, dtype, None))
                        there.add(tensor)
            self._sessions[kind, names] = OnnxModel(model.SerializeToString())
        return self._sessions[kind, names]


EPILOGUES_KEY = "daqconvert.epilogues"


def epilogues(model: object) -> dict[str, SiteOutput]:
    """Return the epilogue of each layer of a model frozen for integer deployment, by name; `{}` for other models."""
    if not isinstance(model, nn.Module):
        return {}
    integer = {m.layer_name for m in model.modules() if isinstance(m, FrozenSite) and m.is_integer}
    return {name: output for name, output in planned_epilogues(model).items() if name in integer}


def planned_epilogues(model: nn.Module) -> dict[str, SiteOutput]:
    """Return what integer deployment would fold into each layer, as the plan of a model says; `{}` without a plan."""
    rows = getattr(model, PLAN_ATTRIBUTE, ())
    return {row.name: row.site.output for row in rows if row.site.output is not None}


def epilogues_text(model: nn.Module) -> str:
    """Return the epilogues of a model as the text that a file holds under `EPILOGUES_KEY`."""
    found = epilogues(model)
    return json.dumps({name: [y.batch_norm, y.lower, y.upper] for name, y in found.items()}, separators=(",", ":"))


def _file_epilogues(metadata: dict[str, str], tensors: dict[str, dict[str, Any]]) -> dict[str, SiteOutput | None]:
    if EPILOGUES_KEY in metadata:
        read: dict[str, list[Any]] = json.loads(metadata[EPILOGUES_KEY])
        return {name: SiteOutput(batch_norm=norm, lower=low, upper=high) for name, (norm, low, high) in read.items()}
    # the output of an output quantizer is its own codes, that of an integer layer is not
    coded = {name: entry for name, entry in tensors.items() if entry.get("grids")}
    return {name: None for name, entry in coded.items() if not set(entry["outputs"]) <= set(entry["codes"])}


def _after(modules: dict[str, nn.Module], output: SiteOutput, y: Tensor) -> Tensor:
    """Return a layer's output `y`, channels at dimension 1, after its batch norm and activation in evaluation mode."""
    norm: Any = None if output.batch_norm is None else modules.get(output.batch_norm)
    if norm is not None and folds(norm):
        g, b = (value.to(y.dtype).reshape(-1, *(1,) * (y.dim() - 2)) for value in folded_numbers(norm))
        y = y * g.to(y.device) + b.to(y.device)
    return y if output.lower is None and output.upper is None else y.clamp(output.lower, output.upper)
