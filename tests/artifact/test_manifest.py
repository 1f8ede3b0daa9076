"""A manifest that somebody edited: refused by its checksum, or by its fields where the checksum was made right too."""

import hashlib
import json

import pytest

import daqconvert as dq
from helpers.artifacts import MANIFEST, assert_same, edit, put, read, refused, small_network, write

ROW = ("plan", "rows", 1)  # of layer "3"
EDITS = {
    "version 0": (put("version", 0), "version: expected a positive integer, found 0"),
    "version true": (put("version", True), "version: expected a positive integer, found True"),
    "version text": (put("version", "1"), "version: expected a positive integer"),
    "version 2": (put("version", 2), r"version 2 is newer than this daqconvert reads \(1\). Upgrade: pip install"),
    "no field": (lambda b: b.pop("dtype"), "field 'dtype' is missing"),
    "extra field": (put("license", "none"), "field 'license' is unknown"),
    "model": (put("model", 3), "model: expected a short text"),
    "model escape": (put("model", "\x1b[2J"), r"model: expected a short text, found '\\x1b\[2J'"),
    "other model": (put("model", "ResNet"), "model: expected a ResNet, found a Sequential"),
    "source": (put("source", 3), "source: found 3"),
    "source kwargs": (put("source_kwargs", []), r"source_kwargs: found \[\]"),
    "kwargs without source": (put("source_kwargs", {"a": 1}), "source_kwargs: have no effect without source"),
    "dtype": (put("dtype", "int64"), "dtype: expected one of float64, float32"),
    "dtype list": (put("dtype", ["float32"]), "dtype: expected one of float64"),
    "bytes": (put("bytes", -1), "bytes: expected a count, found -1"),
    "bytes float": (put("bytes", 2.0), "bytes: expected a count, found 2.0"),
    "sha256": (put("sha256", "0" * 63), "sha256: expected 64 hexadecimal digits"),
    "other sha256": (put("sha256", "0" * 64), "its SHA-256 is not the one in the manifest"),
    "tensors": (put("tensors", []), r"tensors: found \[\]"),
    "no tensors": (put("tensors", {}), "stands in only one of file and manifest"),
    "entry": (put("tensors", "7.bias", 3), "tensors.7.bias: expected dtype, shape"),
    "entry field": (put("tensors", "7.bias", "x", 3), "tensors.7.bias: expected dtype, shape"),
    "entry dtype": (put("tensors", "7.bias", "dtype", "object"), "tensors.7.bias.dtype: expected one of"),
    "entry dtype list": (put("tensors", "7.bias", "dtype", []), "tensors.7.bias.dtype: expected one of"),
    "shape text": (put("tensors", "7.bias", "shape", "5"), "tensors.7.bias.shape: expected a list of sizes"),
    "shape true": (put("tensors", "7.bias", "shape", [True]), "tensors.7.bias.shape: expected a list of sizes"),
    "shape negative": (put("tensors", "7.bias", "shape", [-5]), "tensors.7.bias.shape: expected a list of sizes"),
    "shape long": (put("tensors", "7.bias", "shape", [1] * 17), "tensors.7.bias.shape: expected a list of sizes"),
    "shape huge": (put("tensors", "7.bias", "shape", [2**41]), "tensors.7.bias.shape: expected a list of sizes"),
    "shape product": (put("tensors", "7.bias", "shape", [2**30] * 3), "7.bias.shape: expected a list of sizes"),
    "shape beyond the file": (put("tensors", "7.bias", "shape", [2**39]), r"tensors: they take \d+ bytes, the"),
    "codes beyond the file": (put("tensors", "7.weight_codes", "shape", [2**39]), r"tensors: they take \d+ bytes"),
    "empty shape": (put("tensors", "7.bias", "shape", [0, 2**39]), "7.bias': expected float32"),
    "bits 0": (put("tensors", "7.weight_codes", "bits", 0), "7.weight_codes.bits: expected 1 to 8"),
    "bits 9": (put("tensors", "7.weight_codes", "bits", 9), "7.weight_codes.bits: expected 1 to 8"),
    "bits null": (put("tensors", "7.weight_codes", "bits", None), "7.weight_codes.bits: expected 1 to 8"),
    "bits of floats": (put("tensors", "7.bias", "bits", 4), "7.bias.bits: expected 1 to 8 on a uint8 tensor"),
    "other bits": (put("tensors", "7.weight_codes", "bits", 3), "'7.weight_codes': expected uint8"),
    "same as itself": (put("tensors", "7.bias", "same_as", "7.bias"), "same_as: '7.bias' is no stored tensor"),
    "same as none": (put("tensors", "7.bias", "same_as", "9"), "same_as: '9' is no stored tensor"),
    "same as other": (put("tensors", "7.bias", "same_as", "0.bias"), "same_as: '0.bias' is no stored tensor of that"),
    "same as number": (put("tensors", "7.bias", "same_as", 3), "same_as: expected a name"),
    "same as with bits": (put("tensors", "7.weight_codes", "same_as", "x"), "same_as: expected a name, and no bits"),
    "name": (put("tensors", "../../x\n\x1b[2J" * 50, {"dtype": "int8", "shape": []}), "stands in only one of"),
    "name surrogate": (put("tensors", "\ud800", {"dtype": "int8", "shape": []}), r"'\\ud800' stands in only one of"),
    "plan": (put("plan", 3), "plan: expected an object"),
    "plan rows": (put("plan", "rows", {}), "plan.rows: expected a list"),
    "no rows": (put("plan", "rows", []), "3.weight is missing in the artifact|0.weight is missing"),
    "row field": (put(*ROW, "x", 1), r"plan.rows\[1\]: unknown field 'x'"),
    "row name": (put(*ROW, "site", "name", "4"), "plan: '4': expected a float Conv2d, found a ReLU"),
    "row name long": (put(*ROW, "site", "name", "x" * 9999), "expected a float Conv2d, found no such layer"),
    "row name dunder": (put(*ROW, "site", "name", "__class__"), "expected a float Conv2d, found no such layer"),
    "row twice": (put(*ROW, "site", "name", "0"), "expected each name once; found '0' again"),
    "row kind": (put(*ROW, "site", "kind", "Linear"), "'3': expected a float Linear, found a Conv2d"),
    "row shape": (put(*ROW, "site", "weight_shape", [1]), r"'3': expected a weight of shape \(1,\)"),
    "w_bits 9": (put(*ROW, "settings", "w_bits", 9), r"plan.rows\[1\].settings.w_bits: expected an integer from 1"),
    "w_bits text": (put(*ROW, "settings", "w_bits", "4"), r"plan.rows\[1\].settings.w_bits: expected"),
    "w_bits other": (put(*ROW, "settings", "w_bits", 4), "3.weight_codes: expected 4 bits of packed codes, found 3"),
    "w_bits null": (put(*ROW, "settings", "w_bits", None), "3.weight is missing in the artifact"),
    "a_bits null": (put(*ROW, "settings", "a_bits", None), "'3.input_scale' is not in the model"),
    "a_bits less": (put(*ROW, "settings", "a_bits", 1), None),
    "granularity": (put(*ROW, "settings", "granularity", "tensor"), r"3.scale: the model has shape \(\)"),
    "grid": (put(*ROW, "settings", "grid", "auto"), r'expected nothing on "auto"'),
    "gamma": (put(*ROW, "settings", "w_gamma", -1.0), "w_gamma: expected a positive number"),
    "reason escape": (put(*ROW, "site", "reason", "\x1b[2J"), r"plan: expected printable texts, found '\\x1b\[2J'"),
    "note": (put(*ROW, "notes", ["a\nb"]), "plan: expected printable texts"),
    "count": (put(*ROW, "site", "params", 10**30), "an integer of 31 digits"),
    "checksum list": (put("checksum", []), None),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_with_its_checksum_made_right(artifact, frozen, batch, name):
    change, told = EDITS[name]
    edit(artifact, change)
    if told is None:  # consistent again, or made so by the recomputed checksum
        dq.load(artifact, model=small_network())
        return
    message = refused(artifact, told)
    assert str(artifact) in message


@pytest.mark.parametrize("name", [name for name in EDITS if name != "checksum list"])
def test_an_edited_manifest_as_it_is(artifact, name):
    edit(artifact, EDITS[name][0], sign=False)
    refused(artifact, "its checksum does not fit its contents|version|digits")


@pytest.mark.parametrize("checksum", [None, 3, "", [], {}, "0" * 64])
def test_an_edited_checksum(artifact, checksum):
    body = read(artifact)
    write(artifact, {**body, "checksum": checksum}, sign=False)
    refused(artifact, "its checksum does not fit its contents")
    del body["checksum"]
    write(artifact, body, sign=False)
    refused(artifact, "its checksum does not fit its contents")


@pytest.mark.parametrize("levels", [10, 200, 400, 600, 800, 900, 950, 980, 990, 2000])
def test_deep_nesting(artifact, levels):
    body = {**read(artifact), "source_kwargs": "@"}
    rest = json.dumps({k: v for k, v in body.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    deep = "[" * levels + "]" * levels
    body["checksum"] = hashlib.sha256(rest.replace('"@"', deep).encode()).hexdigest()
    (artifact / MANIFEST).write_text(json.dumps(body).replace('"@"', deep))
    refused(artifact, r"hundreds of times|source_kwargs: found \[\[")


def test_formatting_alone_is_no_edit(artifact, frozen, batch):
    body = read(artifact)
    order = dict(sorted(body.items(), reverse=True))
    (artifact / MANIFEST).write_text(json.dumps(order, separators=(", ", ":\n")), encoding="utf-8")
    assert_same(dq.load(artifact, model=small_network()), frozen, batch)


def test_a_consistent_edit_loads_what_it_says(artifact, batch):
    """Documented in docs/artifact.md: checksums are no signatures. Another grid means other values, and no crash."""
    edit(artifact, put("plan", "rows", 0, "settings", "grid", "midrise"))
    loaded = dq.load(artifact, model=small_network())
    assert loaded(*batch).shape == (2, 5)
