"""Copies of a model: what they share, and what cannot be copied."""

from __future__ import annotations

import threading

import pytest

import daqconvert as dq
from daqconvert.errors import ConversionError
from daqconvert.models import copy_model
from helpers import awkward_models as awkward


def test_copies_that_cannot_be_made_are_explained():
    model = awkward.Chain()
    model.lock = threading.Lock()
    with pytest.raises(ConversionError, match=r"Chain cannot be copied .*lock.*copy\.deepcopy"):
        dq.quantize(model)


def test_a_copy_to_look_at_shares_parameters_and_nothing_else():
    model = awkward.Chain()
    model[0].register_forward_hook(lambda *args: None)
    look, full = copy_model(model, to_look_at=True), copy_model(model)
    assert look[0].weight is model[0].weight and look[1].running_mean is not model[1].running_mean
    assert not look[0]._forward_hooks and full[0]._forward_hooks and model[0]._forward_hooks
    assert full[0].weight is not model[0].weight
