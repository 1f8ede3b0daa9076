"""ONNX Runtime on torch tensors: open a file, run it, time it."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.deploy.signature import keyword_names
from daqconvert.errors import ExportError, nearest

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PROGRAM = ".pt2"  # a path with this ending is a program of torch.export, any other an ONNX file
ERRORS_ONLY = 3  # ONNX Runtime's log severity


def require_packages(names: Sequence[str] = PACKAGES) -> None:
    """Raise `ExportError` if a package that export needs is not installed; the message says how to install it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "Run: pip install 'daqconvert[export]'"
        )


class OnnxModel:
    """An ONNX file in ONNX Runtime, on the CPU, called like a torch model.

    The session has ONNX Runtime's default options, as in deployment.

    Attributes:
        input_names: Names of the graph's inputs, in order.
        input_shapes: Shapes of the inputs; an open dimension is a name or None.
        output_names: Names of the graph's outputs, in order.
        metadata: Texts that the file holds besides its graph, by key.

    Args:
        source: Path of the file, or the serialized model.
        threads: Threads of one operator; None for ONNX Runtime's default, all cores.

    Raises:
        ExportError: If there is no such file, or ONNX Runtime refuses it.
    """

    def __init__(self, source: str | Path | bytes, threads: int | None = None) -> None:
        require_packages(["onnxruntime"])
        import onnxruntime

        if not isinstance(source, bytes) and not Path(source).is_file():
            raise ExportError(f"{source}: no such file.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # NOTE: ONNX Runtime has an exception for each kind of failure, and no base class
            what = "the model" if isinstance(source, bytes) else str(source)
            raise ExportError(f"{what}: ONNX Runtime cannot load it: {str(error).strip()[:400]}") from error
        self.input_names = [i.name for i in self._session.get_inputs()]
        self.input_shapes: list[list[int | str | None]] = [i.shape for i in self._session.get_inputs()]
        self.output_names = [o.name for o in self._session.get_outputs()]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output tensor, or a tuple of them, for the arguments that the torch model takes.

        Raises:
            ExportError: If the number or the names of the tensors do not match the file's inputs.
        """
        outputs = self.run(args, kwargs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return all outputs, in the order of `output_names`; raises `ExportError` as a call does."""
        try:
            results = self._session.run(None, self.feeds(args, kwargs))
        except ExportError:
            raise
        except Exception as error:  # NOTE: no common base class, as when the file is opened
            raise ExportError(f"ONNX Runtime cannot run the model: {str(error).strip()[:400]}") from error
        return [torch.from_numpy(value) for value in results]

    def bound(self, *args: Any, **kwargs: Any) -> Callable[[], object]:
        """Return a function, for timing, that runs the model on these arguments and returns NumPy arrays."""
        feeds = self.feeds(args, kwargs)
        return lambda: self._session.run(None, feeds)

    def feeds(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the graph's inputs by name: positional tensors in order, keyword tensors by their key."""
        named = dict(keyword_names(kwargs))
        unknown = [key for key in named if key not in self.input_names]
        if unknown:
            raise ExportError(
                f"the ONNX model has no input {unknown[0]!r}; its inputs are {', '.join(self.input_names)}."
                f"{nearest(unknown[0], self.input_names)}"
            )
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        names = [name for name in self.input_names if name not in named]
        if len(tensors) != len(names):
            raise ExportError(
                f"the ONNX model takes {len(self.input_names)} tensors ({', '.join(self.input_names)}), "
                f"found {len(tensors) + len(named)}."
            )
        named |= dict(zip(names, tensors, strict=True))
        return {key: _plain(value).numpy() for key, value in named.items()}


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def read_program(path: Path) -> nn.Module:
    """Return a program of torch.export that was written to a `.pt2` file, as a module.

    Raises:
        ExportError: If there is no such file, or torch cannot read it.
    """
    return _program(path).module()


def program_shapes(path: Path) -> list[list[int | str | None]]:
    """Return the shapes of a program's input tensors; an open dimension is None. Raises as `read_program` does."""
    program = _program(path)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    tensors = [node.meta["val"] for node in inputs if isinstance(node.meta.get("val"), Tensor)]
    return [[size if isinstance(size, int) else None for size in tensor.shape] for tensor in tensors]


def _program(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise ExportError(f"{path}: no such file.")
    try:
        return torch.export.load(path)
    except Exception as error:  # NOTE: torch raises many kinds, some of them assertions
        said = (str(error).strip().splitlines() or [""])[0][:300]
        raise ExportError(f"{path}: torch.export cannot load it: {type(error).__name__}: {said}") from error


def time_session(model: OnnxModel, *args: Any, repeats: int = 20, warmup: int = 3, **kwargs: Any) -> float:
    """Return the median time of one call, divided by the batch size: seconds per image.

    Args:
        model: The file, opened.
        *args: Positional arguments of one call.
        repeats: Number of timed calls.
        warmup: Number of calls before them that are not timed.
        **kwargs: Keyword arguments of one call.

    Returns:
        Seconds per element of the batch.
    """
    feeds = model.feeds(args, kwargs)
    size = max((value.shape[0] for value in feeds.values() if value.ndim), default=1)
    times = []
    for i in range(warmup + repeats):
        start = time.perf_counter()
        model._session.run(None, feeds)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times) / size
