"""The table of targets: names, suffixes, and an unknown name."""

import pytest

from daqconvert.errors import ExportError, PolicyError
from daqconvert.spec.targets import TARGETS, find_target


def test_every_target_is_found_by_its_own_name():
    assert list(TARGETS) == [
        "onnxruntime", "packed", "openvino", "tensorrt", "qnn", "executorch", "litert", "coreml", "inductor",
    ]  # fmt: skip
    assert all(find_target(name) is target and target.name == name for name, target in TARGETS.items())


def test_suffixes_are_those_of_the_runtimes_files():
    suffixes = {name: target.suffix for name, target in TARGETS.items() if target.suffix != ".onnx"}
    assert suffixes == {"executorch": ".pte", "litert": ".tflite", "coreml": ".mlpackage", "inductor": ".pt2"}


def test_choices_of_quantization_are_words_of_the_class():
    assert {target.outputs for target in TARGETS.values()} == {"meeting", "all"}
    assert {target.sums for target in TARGETS.values()} == {"both", "shortcut"}
    assert [name for name, target in TARGETS.items() if target.symmetric] == ["tensorrt"]
    assert [name for name, target in TARGETS.items() if target.operators] == ["qnn"]
    assert [name for name, target in TARGETS.items() if target.outputs == "all"] == ["qnn", "executorch", "litert"]


@pytest.mark.parametrize("name", ["tensort", "TensorRT", None, 4])
def test_an_unknown_target_is_refused_with_all_names(name):
    with pytest.raises(PolicyError, match=r"is no target.*Targets are: onnxruntime, packed, openvino, tensorrt"):
        find_target(name)


def test_the_nearest_name_and_the_place_are_named_and_the_class_of_the_error_is_the_callers():
    with pytest.raises(ExportError, match=r"^export: 'lite_rt' is no target. Nearest: litert"):
        find_target("lite_rt", where="export", error=ExportError)
