"""Files that are missing, damaged or no files, tensors that somebody exchanged, skeletons that do not fit."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import daqconvert as dq
from daqconvert.artifact import read_manifest
from daqconvert.errors import ArtifactError
from helpers.artifacts import MANIFEST, TENSORS, assert_same, refused, reseal, small_network


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        pytest.param(lambda p: p.unlink(), "not an artifact: it holds no file", id="missing"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), "not an artifact: it holds no file", id="a directory"),
        pytest.param(lambda p: (p.unlink(), os.mkfifo(p)), "not an artifact: it holds no file", id="a pipe"),
        pytest.param(lambda p: (p.unlink(), p.symlink_to("/dev/zero")), "it holds no file", id="an endless device"),
        pytest.param(lambda p: (p.unlink(), p.symlink_to(p)), "it holds no file", id="a link to itself"),
        pytest.param(lambda p: p.write_bytes(b""), "not readable as JSON", id="empty"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-9]), "truncated or damaged", id="truncated"),
        pytest.param(lambda p: p.write_bytes(b"\xff" + p.read_bytes()), "not readable as JSON", id="not UTF-8"),
        pytest.param(lambda p: p.write_text(p.read_text(), "utf-16"), "not readable as JSON", id="UTF-16"),
        pytest.param(lambda p: p.write_text("[" * 100_000), "in one another hundreds of times", id="deep"),
        pytest.param(lambda p: p.write_text("[]"), "expected an object", id="a list"),
        pytest.param(lambda p: p.write_text('{"format": "other"}'), 'expected an object with "format"', id="format"),
        pytest.param(lambda p: p.write_text('{"a": 1, "b": 1, "a": 1}'), "'a' stands there twice", id="twice"),
        pytest.param(lambda p: p.write_text('{"a": 1e999}'), "the number 1e999", id="infinite"),
        pytest.param(lambda p: p.write_text('{"a": NaN}'), "the number NaN", id="NaN"),
        pytest.param(lambda p: p.write_text('{"a": %s}' % ("9" * 5000)), "an integer of 5000 digits", id="digits"),
        pytest.param(lambda p: os.truncate(p, (16 << 20) + 1), "a manifest has at most", id="large"),
    ],
)
def test_a_spoiled_manifest(artifact, spoil, told):
    spoil(artifact / MANIFEST)
    message = refused(artifact, told)
    assert str(artifact) in message


def test_no_such_directory(tmp_path):
    for path in (tmp_path / "none", str(tmp_path / "none"), tmp_path / ("x" * 300), "a\0b", ""):
        with pytest.raises(ArtifactError, match=r"not an artifact|cannot be read"):
            dq.load(path)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        pytest.param(lambda p: p.unlink(), "missing, or no file", id="missing"),
        pytest.param(lambda p: (p.unlink(), p.mkdir()), "missing, or no file", id="a directory"),
        pytest.param(lambda p: (p.unlink(), os.mkfifo(p)), "missing, or no file", id="a pipe"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated or replaced", id="truncated"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes() + b"\0"), "truncated or replaced", id="longer"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[::-1]), "SHA-256", id="reversed"),
    ],
)
def test_a_spoiled_tensor_file(artifact, spoil, told):
    spoil(artifact / TENSORS)
    message = refused(artifact, told)
    assert message.startswith(str(artifact / TENSORS))


def test_links_are_followed(artifact, frozen, batch, tmp_path):
    for file in (MANIFEST, TENSORS):
        (artifact / file).rename(tmp_path / file)
        (artifact / file).symlink_to(tmp_path / file)
    assert_same(dq.load(artifact, model=small_network()), frozen, batch)


# What a header of a tensor file may look like after somebody has recomputed every checksum
HEADERS = {
    "no length": b"\x01",
    "length beyond the file": b"\xff" * 7 + b"\x7f{}",
    "no JSON": (5).to_bytes(8, "little") + b"{{{{{",
    "a list": (2).to_bytes(8, "little") + b"[]",
    "empty": (2).to_bytes(8, "little") + b"{}",
    "not UTF-8": (2).to_bytes(8, "little") + b"\xff\xfe",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_resealed_tensor_file_with_a_broken_header(artifact, name):
    (artifact / TENSORS).write_bytes(HEADERS[name].ljust((artifact / TENSORS).stat().st_size, b"\0"))
    reseal(artifact)
    refused(artifact, "not readable as safetensors|stands in only one of")


def _retyped(tensors):
    tensors["7.scale"] = tensors["7.scale"].view(torch.int32)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(lambda t: t.pop("7.scale"), "'7.scale' stands in only one", id="one less"),
        pytest.param(lambda t: t.update(other=torch.ones(1)), "'other' stands in only one", id="one more"),
        pytest.param(
            lambda t: t.update({"7.scale": t["1.bias"], "1.bias": t["7.scale"]}), "expected float32", id="swap"
        ),
        pytest.param(_retyped, "7.scale': expected float32", id="dtype"),
        pytest.param(lambda t: t.update({"7.bias": t["7.bias"][None]}), "7.bias': expected float32", id="shape"),
        pytest.param(lambda t: t.update({"7.weight_codes": t["7.weight_codes"][:-1]}), "expected uint8", id="codes"),
        pytest.param(
            lambda t: t["3.weight_codes"].fill_(255), "3.weight_codes: expected 0 to 6, found 7", id="a code"
        ),
        pytest.param(
            lambda t: t["3.input_zero_point"].fill_(16), "3.input_zero_point: expected 0 to 15", id="zero point"
        ),
    ],
)
def test_a_resealed_tensor_file(artifact, change, told):
    tensors = load_file(artifact / TENSORS)
    change(tensors)
    save_file(tensors, artifact / TENSORS)
    reseal(artifact)
    message = refused(artifact, told)
    assert str(artifact / TENSORS) in message


SKELETONS = {
    "another class": (lambda: nn.Conv2d(3, 8, 3), "model: expected a Sequential, found a Conv2d"),
    "one layer less": (lambda: small_network()[:-1], "plan: '7': expected a float Linear, found no such layer"),
    "one layer more": (
        lambda: nn.Sequential(*small_network(), nn.Linear(5, 5)),
        "8.weight is missing in the artifact",
    ),
    "wider": (lambda: _with(7, nn.Linear(6, 9)), r"'7': expected a weight of shape \(5, 6\), found \(9, 6\)"),
    "no bias": (lambda: _with(7, nn.Linear(6, 5, bias=False)), "'7.bias' is not in the model"),
    "lazy": (lambda: _with(7, nn.LazyLinear(5)), "'7': expected a float Linear, found a LazyLinear"),
    "quantized": (lambda: dq.quantize(small_network()), "expected a float Conv2d, found a QuantConv2d"),
    "integer": (lambda: _with(1, IntegerNorm()), "1.weight: the model has int64, the artifact float32"),
}


class IntegerNorm(nn.BatchNorm2d):
    def __init__(self):
        super().__init__(8)
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.int64), requires_grad=False)


def _with(index, layer):
    model = small_network()
    model[index] = layer
    return model


@pytest.mark.parametrize("name", SKELETONS)
def test_a_skeleton_that_does_not_fit(original, name):
    make, told = SKELETONS[name]
    refused(original, told, model=make())


def test_a_skeleton_whose_loading_hook_objects(original):
    model = small_network()
    model.register_load_state_dict_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mine")))
    refused(original, "does not fit Sequential.*mine", model=model)


def test_no_source_and_no_skeleton(original):
    with pytest.raises(ArtifactError, match=r"names no source.*Pass one of the same structure: daqconvert.load\("):
        dq.load(original)


def test_the_manifest_alone(original):
    manifest = read_manifest(original)
    assert manifest.model == "Sequential" and len(manifest.plan.converted) == 3
    assert Path(original, TENSORS).stat().st_size == manifest.bytes
