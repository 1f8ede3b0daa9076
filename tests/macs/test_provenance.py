"""Where operands come from: what layers make of a parameter is no weight; memory that is used again is new."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from daqconvert.macs.provenance import Origin, Provenance
from helpers.counted import events_of


class Derived(nn.Module):
    """Two layers on a parameter that stands in for an input, as DETR's queries: only the layers have weights."""

    def __init__(self):
        super().__init__()
        self.query, self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.query)) @ x.t()


def test_what_layers_make_of_a_parameter_is_an_activation():
    events = events_of(Derived(), torch.randn(5, 4))
    assert [(e.tensors[-1:], e.attention) for e in events] == [
        (("a.weight",), False),
        (("b.weight",), False),
        ((), True),
    ]


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_memory_that_is_used_again_is_not_taken_for_what_was_there(fake):
    provenance, mode = Provenance(), FakeTensorMode()
    seen = set()
    for _ in range(200):
        with mode if fake else torch.no_grad():
            tensor = torch.ones(7)
        assert provenance.of(tensor) == Origin()
        provenance.set(tensor, Origin(quantized=True))
        assert provenance.of(tensor.view(7, 1)).quantized
        seen.add(tensor.untyped_storage()._cdata)
        del tensor
    assert len(seen) == 200  # held by weak references: no address comes twice
