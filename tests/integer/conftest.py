"""Frozen models of integer deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import daqconvert as dq
from integer.networks import trained


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quantized() -> Callable[..., tuple[nn.Module, Tensor]]:
    """Quantize a network of `networks` for integer deployment and calibrate it."""

    def make(name: str, w_bits: int = 4, a_bits: int = 4, **settings: Any) -> tuple[nn.Module, Tensor]:
        model, x = trained(name)
        qmodel = dq.quantize(model, w_bits=w_bits, a_bits=a_bits, **{"deploy": "integer", **settings})
        dq.calibrate(qmodel, [x])
        return qmodel.eval(), x

    return make
