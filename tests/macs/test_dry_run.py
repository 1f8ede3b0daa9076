"""A run on shapes alone sees what a run on values sees, without memory; who is told of a failure."""

import pytest
import torch
from torch import nn

from daqconvert.errors import ConversionError
from daqconvert.macs import Places, count_macs, counting, observe
from helpers.cases import CASES, run


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_run_on_shapes_sees_what_a_run_on_values_sees(case):
    model, batch = case.make().eval(), case.batch()
    args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
    before = torch.backends.mha.get_fastpath_enabled()
    shapes = observe(model, args, kwargs)
    assert torch.backends.mha.get_fastpath_enabled() is before
    with counting(model, (args, kwargs)) as counter:  # with gradients: nothing is fused
        run(model, batch)
    if case.id == "branch-on-data":
        assert shapes is None  # a value decides: no size, no guess
        shapes = observe(model, args, kwargs, required=True)
    assert shapes is not None
    assert not any(e.op.startswith(("_native", "_transformer")) for e in shapes)  # fake tensors run these for real
    assert [(e.macs, e.tensors) for e in shapes] == [(e.macs, e.tensors) for e in counter.events]


def test_a_model_on_meta_counts_without_memory():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU()), torch.empty(2, 10**6)
    assert count_macs(model, Places({"0"}), (x,), {}) == {"0": 10**12}


def test_a_failure_of_the_model_is_told_only_where_the_inputs_are_the_users():
    model, x = nn.Linear(4, 4), torch.randn(1, 5)
    assert count_macs(model, Places({""}), (x,), {}) is None
    with pytest.raises(ConversionError, match="example_inputs: Linear fails"):
        count_macs(model, Places({""}), (x,), {}, required=True)
