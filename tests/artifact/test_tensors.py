"""The tensor file is byte for byte what the safetensors library writes, one tensor after the other."""

from __future__ import annotations

import random
import sys

import pytest
import torch
from safetensors.torch import save_file

from daqconvert.artifact import tensors
from daqconvert.artifact.manifest import DTYPES, TensorEntry
from daqconvert.artifact.tensors import write_tensors
from daqconvert.errors import ArtifactError
from daqconvert.functional.packing import pack


def entries(state):
    return {key: TensorEntry(str(value.dtype)[6:], tuple(value.shape)) for key, value in state.items()}


def every_dtype():
    """Tensors of every dtype, in no order, of awkward names and shapes."""
    state = {}
    for i, name in enumerate(sorted(DTYPES)):
        values = (torch.arange(5 + i) % 2).to(getattr(torch, name))
        state |= {
            f"{'zyxab'[i % 5]}.{name}": values,
            f'\N{LATIN SMALL LETTER E WITH ACUTE}{i}"\\\n\x7f': values.clone()[None],
        }
        state |= {f"empty{i}": values[:0].clone(), f"scalar{i}": values[0].clone()}
    keys = list(state)
    random.Random(0).shuffle(keys)
    return {key: state[key] for key in keys}


@pytest.mark.parametrize("state", [every_dtype(), {}, {"": torch.ones(1)}], ids=["all", "none", "root"])
def test_the_bytes_are_those_of_the_library(state, tmp_path):
    save_file(state, tmp_path / "theirs")
    write_tensors(tmp_path / "ours", entries(state), state)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path):
    base = torch.randn(4, 6)
    odd = torch.view_as_complex(torch.randn(3, 2))
    state = {"a": base.t(), "b": base[1:, ::2], "c": base, "d": odd.conj(), "e": torch._neg_view(base)}
    save_file(
        {key: value.clone().contiguous().resolve_neg().resolve_conj() for key, value in state.items()}, tmp_path / "x"
    )
    write_tensors(tmp_path / "y", entries(state), state)
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


def test_codes_are_packed_and_second_names_are_left_out(tmp_path):
    codes = torch.randint(0, 8, (5, 7), dtype=torch.uint8)
    state = {"codes": codes, "again": codes, "x": torch.randn(3)}
    told = {"codes": TensorEntry("uint8", (5, 7), bits=3), "again": TensorEntry("uint8", (5, 7), same_as="codes")}
    write_tensors(tmp_path / "y", told | {"x": TensorEntry("float32", (3,))}, state)
    save_file({"codes": pack(codes, 3), "x": state["x"]}, tmp_path / "x")
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()
    with pytest.raises(ArtifactError, match="does not fit in 2 bits"):
        write_tensors(tmp_path / "y", {"codes": TensorEntry("uint8", (5, 7), bits=2)}, {"codes": codes | 4})


def test_values_are_little_endian_everywhere(monkeypatch):
    x, z = torch.tensor([1.0, -2.5]), torch.tensor([1 + 2j], dtype=torch.complex64)
    monkeypatch.setattr(tensors.sys, "byteorder", {"little": "big", "big": "little"}[sys.byteorder])
    assert bytes(tensors._bytes(x, None)) == x.numpy().byteswap().tobytes()
    assert bytes(tensors._bytes(z, None)) == z.numpy().byteswap().tobytes()
    assert bytes(tensors._bytes(torch.tensor([1, 2], dtype=torch.uint8), None)) == b"\x01\x02"
