"""What the tests of artifacts share: freezing, comparing whole models, and editing artifacts as an attacker would."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import daqconvert as dq
from daqconvert.errors import ArtifactError
from helpers.cases import run

MANIFEST, TENSORS = "daqconvert.json", "model.safetensors"


def small_network() -> nn.Module:
    """Return a small network with a grouped convolution, batch norm and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def frozen_of(model: nn.Module, batch: Any, **settings: Any) -> nn.Module:
    """Quantize, calibrate on one batch, freeze."""
    qmodel = dq.quantize(model, **settings)
    dq.calibrate(qmodel, [batch], method="minmax")  # the quickest method; good bounds are not needed here
    return dq.freeze(qmodel)


def assert_same(found: nn.Module, expected: nn.Module, batch: Any) -> None:
    """Assert that state dict, output, plan, modes, and which names share a tensor are the same in two models."""
    assert type(found) is type(expected)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype, key
        assert torch.equal(ours[key], value), key
    assert shared_names(found) == shared_names(expected)
    assert dq.plan(found) == dq.plan(expected)
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    with torch.no_grad():
        pairs = zip(tree_leaves(run(found, batch)), tree_leaves(run(expected, batch)), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def shared_names(model: nn.Module) -> list[list[str]]:
    """Return groups of names that share one parameter or one buffer."""
    groups: dict[int, list[str]] = {}
    everything = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in everything:
        groups.setdefault(id(tensor), []).append(name)
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def read(artifact: Path) -> dict[str, Any]:
    """The manifest's object."""
    body: dict[str, Any] = json.loads((artifact / MANIFEST).read_text())
    return body


def checksum(body: dict[str, Any]) -> str:
    """Return the checksum of a manifest as `docs/artifact.md` defines it."""
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write(artifact: Path, body: dict[str, Any], sign: bool = True) -> None:
    """Write a manifest's object; with `sign` its checksum is computed anew."""
    (artifact / MANIFEST).write_text(json.dumps({**body, "checksum": checksum(body)} if sign else body))


def edit(artifact: Path, change: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Change the manifest; with `sign` its checksum is computed anew, as an attacker would."""
    body = read(artifact)
    change(body)
    write(artifact, body, sign)


def reseal(artifact: Path) -> None:
    """Make size, SHA-256 and checksum fit a tensor file that was changed."""
    content = (artifact / TENSORS).read_bytes()
    edit(artifact, lambda body: body.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))


def put(*path_and_value: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that changes one field: `put("tensors", "7.bias", "shape", [3])`."""
    *path, value = path_and_value

    def change(body: Any) -> None:
        for step in path[:-1]:
            body = body[step]
        body[path[-1]] = value

    return change


def refused(artifact: Path, match: str, model: nn.Module | None = None) -> str:
    """Assert that loading raises an `ArtifactError` with a short and printable message, and return the message."""
    with pytest.raises(ArtifactError, match=match) as told:
        dq.load(artifact, model=small_network() if model is None else model)
    message = str(told.value)
    assert len(message) < 1500 and message.isprintable()
    return message
