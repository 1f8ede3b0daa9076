"""A frozen model as a `.pt2` file: a program of `torch.export`, reloaded and compared before it is there."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from daqconvert.deploy.lowering import example_arguments, first_lines, open_batch, quiet, repeated
from daqconvert.errors import ExportError
from daqconvert.files import replacing

SUFFIX = ".pt2"


@dataclass(frozen=True)
class ProgramReport:
    """What `export` wrote as a program, and how well it agrees with the model.

    Attributes:
        path: The file.
        file_bytes: Its size.
        samples: Number of samples compared.
        largest_difference: Largest absolute difference of an output; 0 where every element is the same.
    """

    path: str
    file_bytes: int
    samples: int
    largest_difference: float

    @property
    def agrees(self) -> bool:
        """Whether the reloaded program computes the same, every element."""
        return self.largest_difference == 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        return {**vars(self), "agrees": self.agrees}

    def __str__(self) -> str:
        """Return two lines of text."""
        same = "identical" if self.agrees else f"largest difference {self.largest_difference:.3g}"
        return f"{self.path}: {self.file_bytes:,} bytes\nreloaded, {self.samples} samples: {same}"


def export_program(model: nn.Module, target: Path, example_inputs: Any, dynamic_batch: bool) -> ProgramReport:
    """Write a model as a program, reload it, and compare the two on the example inputs.

    Args:
        model: Frozen, in its own dtype and on its own device.
        target: The file.
        example_inputs: As `export` takes them.
        dynamic_batch: Whether the first dimension of the inputs is left open.

    Raises:
        ExportError: If torch cannot follow the model, or reads the file in another way than it was written.
    """
    arguments = example_arguments(example_inputs, move=False)
    args, kwargs = repeated(arguments) if dynamic_batch else arguments
    try:
        with torch.no_grad(), quiet():
            shapes = open_batch(model, (args, kwargs)) if dynamic_batch else None
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            stream = io.BytesIO()
            torch.export.save(program, stream)
            stream.seek(0)
            again = torch.export.load(stream).module()
            wanted, found = (tree_leaves(each(*args, **kwargs)) for each in (model, again))
    except Exception as error:  # NOTE: the model's own code runs here under tracing and may raise anything
        hint = " If its batch size is fixed, pass dynamic_batch=False." if dynamic_batch else ""
        raise ExportError(
            f"export: torch.export cannot follow {type(model).__name__}: {first_lines(error)}{hint}"
        ) from error
    pairs = [(a, b) for a, b in zip(wanted, found, strict=True) if isinstance(a, Tensor)]
    with replacing(target, ExportError, "Make room, or choose another place.") as temporary:
        temporary.write_bytes(stream.getvalue())
    largest = max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    samples = max((a.shape[0] for a, _ in pairs if a.dim()), default=1)
    return ProgramReport(str(target), len(stream.getvalue()), samples, largest)
