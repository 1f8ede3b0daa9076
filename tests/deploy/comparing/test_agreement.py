"""What differs because of the layer itself is told from what differs because of those before it."""

import copy
import math

import pytest
import torch

import daqconvert as dq
from daqconvert.deploy.comparing.agreement import CodeDifferences, FileAgreement, Noise, OutputNoise
from daqconvert.deploy.comparing.probes import ModuleProbe
from daqconvert.errors import ExportError


def test_layer_that_is_wrong_is_told_from_those_after_it(frozen, chain, images, tmp_path):
    model = frozen(chain, images)
    dq.export(model, tmp_path / "model.onnx", images)
    other = copy.deepcopy(model)
    other[0].scale.mul_(1.3)  # the codes made of its output differ: those of layer 3, and by them those of 8
    found = FileAgreement(ModuleProbe(other), (tmp_path / "model.onnx").read_bytes())
    found.add((images,), {})
    first, second, third = found.layers()
    assert (first.name, first.differing, first.differing_same) == ("0", 0, 0)
    assert second.differing == second.differing_same > 0
    assert third.differing > 0
    assert third.differing_same == 0
    assert found.outputs.sqnr < 60
    assert found.outputs_same.sqnr > 100


def test_noise_is_summed_over_tensors():
    noise = Noise()
    noise.add("a", [torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])])
    noise.add("a", [torch.tensor([[5.0]])], [torch.tensor([[4.0]])])
    assert (noise.signal, noise.noise, noise.largest) == (50.0, 1.25, 1.0)
    assert noise.sqnr == pytest.approx(10 * math.log10(40))


@pytest.mark.parametrize(
    ("wanted", "found", "sqnr", "largest"),
    [
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], math.inf, 0.0),
        ([1.0, 2.0], [1.0, math.nan], -math.inf, math.inf),
        ([0.0, 0.0], [0.0, 1.0], -math.inf, 1.0),
        ([], [], math.inf, 0.0),
    ],
    ids=["equal nan and inf", "new nan", "no signal", "empty"],
)
def test_noise_at_the_edges(wanted, found, sqnr, largest):
    noise = Noise()
    noise.add("a", [torch.tensor(wanted)], [torch.tensor(found)])
    assert (noise.sqnr, noise.largest) == (sqnr, largest)


def test_codes_are_counted_without_wrapping_around():
    codes = CodeDifferences()
    codes.add("a", [torch.tensor([0, 7], dtype=torch.uint8)], [torch.tensor([255, 7], dtype=torch.uint8)])
    assert (codes.elements, codes.differing, codes.largest) == (2, 1, 255)


def test_calls_of_another_number():
    one = torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(ExportError, match=r"a: expected codes of shapes \[\(2,\), \(2,\)\], found \[\(2,\)\]"):
        CodeDifferences().add("a", [one, one], [one])


def test_classes_are_those_of_the_first_matrix():
    outputs = OutputNoise()
    outputs.add_results([torch.zeros(2), torch.eye(2)], [torch.zeros(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])])
    assert (outputs.class_agreement, outputs.samples) == (0.5, 2)
