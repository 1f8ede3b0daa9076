"""Codes in a program, and which nodes of a traced model leave them codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import daqconvert.deploy.onnx.frozen_operators  # noqa: F401 # registers `daqconvert::input_operand` and the others
from daqconvert.functional.integer import code_of

ATEN, OURS = torch.ops.aten, torch.ops.daqconvert
CONVOLUTIONS = (ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv3d.default)
PRODUCTS = (*CONVOLUTIONS, ATEN.linear.default)
DYNAMIC = (ATEN.matmul.default, ATEN.bmm.default)
VIEWS = (ATEN.view.default, ATEN._unsafe_view.default)
MOVING = (
    *VIEWS,
    ATEN.max_pool1d.default, ATEN.max_pool2d.default, ATEN.max_pool3d.default, ATEN.flatten.using_ints,
    ATEN.reshape.default, ATEN.permute.default, ATEN.transpose.int, ATEN.unsqueeze.default,
    ATEN.squeeze.dim, ATEN.squeeze.dims, ATEN.slice.Tensor, ATEN.select.int, ATEN.expand.default,
)  # fmt: skip
SAME = (ATEN.contiguous.default, ATEN.clone.default, ATEN.dropout.default, ATEN.alias.default, ATEN.detach.default)


@dataclass(frozen=True)
class Codes:
    """A tensor of the program that holds codes: real values are `(code - zero_point) * scale`.

    Attributes:
        node: Computes the codes, in the type of the dialect.
        scale: Real units per code.
        zero_point: Code of zero, of `0..255`.
        low: Smallest code.
        high: Largest code.
    """

    node: fx.Node
    scale: float
    zero_point: int
    low: int
    high: int

    def same_grid(self, other: object) -> bool:
        """Return whether a code means the same value in both."""
        return isinstance(other, Codes) and (self.scale, self.zero_point) == (other.scale, other.zero_point)


def moves(node: Any) -> bool:
    """Whether a node only moves elements, or pads with zeros."""
    if node.target is ATEN.pad.default:
        mode, value = ([*node.args[2:], *(None, None)])[:2]
        return mode not in (None, "constant") or value in (None, 0, 0.0)
    return node.target in MOVING


def read_as_codes(node: Any) -> bool:
    """Whether a value that is on a grid has a reader to which this matters: anything but float operators alone."""
    readers = (OURS.input_operand.default, OURS.round_to_grid.default, ATEN.add.Tensor, ATEN.cat.default, *PRODUCTS)
    return any(
        user.target in readers or ((moves(user) or user.target in SAME) and read_as_codes(user)) for user in node.users
    )


def clips_nothing(node: Any, codes: Codes) -> bool:
    """Whether an activation lets all codes of a tensor through unchanged."""
    if node.target is ATEN.relu.default:
        bounds: tuple[Any, Any] = (0.0, None)
    elif node.target is ATEN.relu6.default:
        bounds = (0.0, 6.0)
    elif node.target in (ATEN.hardtanh.default, ATEN.clamp.default):
        default = (-1.0, 1.0) if node.target is ATEN.hardtanh.default else (None, None)
        bounds = (*node.args[1:], *default[len(node.args) - 1 :])
    else:
        return False
    low, high = (None if b is None else code_of(b, codes.scale, codes.zero_point) for b in bounds)
    return (low is None or low <= codes.low) and (high is None or codes.high <= high)
