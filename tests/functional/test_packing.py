"""Bit packing: bytes written out by hand, the round trip at every width and length, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from daqconvert.errors import ArtifactError, PolicyError
from daqconvert.functional import packing
from daqconvert.functional.packing import pack, packed_size, unpack

BITS = range(1, 9)


def u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def planes_in_plain_python(codes: list[int], bits: int) -> list[int]:
    """The documented layout, one bit at a time."""
    size = -(-len(codes) // 8)
    out = [0] * (bits * size)
    for i, code in enumerate(codes):
        for plane in range(bits):
            out[plane * size + i // 8] |= (code >> plane & 1) << (i % 8)
    return out


# bytes worked out by hand: plane 0 (least significant) first, element i is bit i % 8 of byte i // 8
BY_HAND = [
    pytest.param(1, [], [], id="empty"),
    pytest.param(1, [1], [0b00000001], id="one bit"),
    pytest.param(1, [0, 1, 0, 0, 0, 0, 0, 1], [0b10000010], id="one full byte"),
    pytest.param(1, [0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1], id="nine bits take two bytes"),
    pytest.param(2, [1, 0, 3], [0b101, 0b100], id="2 bits"),
    pytest.param(3, [7, 4, 1, 2, 0, 5, 3, 6, 6], [0b01100101, 0, 0b11001001, 1, 0b10100011, 1], id="3 bits, 9 codes"),
    pytest.param(4, [15, 8, 1], [0b101, 0b001, 0b001, 0b011], id="4 bits"),
    pytest.param(8, [0x80, 0x01, 0xFF], [6, 4, 4, 4, 4, 4, 4, 5], id="8 bits"),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BY_HAND)
def test_bytes_by_hand(bits, codes, expected):
    assert pack(u8(*codes), bits).tolist() == expected == planes_in_plain_python(codes, bits)
    assert unpack(u8(*expected), bits, (len(codes),)).tolist() == codes


@pytest.mark.parametrize("bits", BITS, ids="{}bit".format)
def test_round_trip_and_layout_at_every_length(bits):
    for length in [*range(41), 1000, 1001, 1023, 4096]:
        codes = torch.randint(0, 2**bits, (length,), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == (bits * math.ceil(length / 8),) == (packed_size(length, bits),)
        assert packed.tolist() == planes_in_plain_python(codes.tolist(), bits)
        assert torch.equal(unpack(packed, bits, (length,)), codes)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), shape=st.lists(st.integers(0, 7), max_size=4))
def test_round_trip_of_any_codes_in_any_shape(data, bits, shape):
    count = math.prod(shape)
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes = torch.tensor(values, dtype=torch.uint8).reshape(shape)
    found = unpack(pack(codes, bits), bits, shape)
    assert (found.dtype, found.shape) == (torch.uint8, codes.shape)
    assert torch.equal(found, codes)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), planes=st.lists(st.integers(0, 255), min_size=1, max_size=6))
def test_full_bytes_survive_unpack_and_pack(bits, planes):
    packed = torch.tensor(planes * bits, dtype=torch.uint8)
    assert torch.equal(pack(unpack(packed, bits, (8 * len(planes),)), bits), packed)


def test_strided_codes_are_taken_in_row_major_order():
    codes = torch.randint(0, 8, (5, 3, 4), dtype=torch.uint8)
    turned = codes.permute(2, 0, 1)
    assert torch.equal(pack(turned, 3), pack(turned.contiguous(), 3))
    assert torch.equal(unpack(pack(turned, 3), 3, turned.shape), turned)
    assert torch.equal(unpack(pack(turned, 3).repeat_interleave(2)[::2], 3, turned.shape), turned)


def test_pack_leaves_its_argument_alone():
    codes = u8(3, 1, 2)
    pack(codes, 2)
    assert codes.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("count", "bits", "size"), [(0, 8, 0), (1, 1, 1), (8, 1, 1), (9, 1, 2), (16, 3, 6), (17, 3, 9), (1000, 5, 625)]
)
def test_size(count, bits, size):
    assert packed_size(count, bits) == size


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool], ids=str)
def test_codes_of_another_dtype_are_refused(dtype):
    with pytest.raises(ArtifactError, match=re.escape(f"expected codes of dtype uint8, found {dtype}")):
        pack(torch.zeros(3, dtype=dtype), 2)


@pytest.mark.parametrize("bits", range(1, 8), ids="{}bit".format)
def test_code_that_does_not_fit_is_refused(bits):
    with pytest.raises(
        ArtifactError, match=re.escape(f"code {2**bits} does not fit in {bits} bits (0 to {2**bits - 1})")
    ):
        pack(u8(0, 2**bits, 1), bits)
    assert pack(u8(2**bits - 1), bits).tolist() == [1] * bits


@pytest.mark.parametrize("found", [0, 5, 7, 12], ids="{}bytes".format)
def test_wrong_number_of_bytes_is_refused(found):
    with pytest.raises(
        ArtifactError, match=re.escape(f"expected 6 bytes of uint8 for (3, 5) at 3 bits, found {found}")
    ):
        unpack(torch.zeros(found, dtype=torch.uint8), 3, (3, 5))


def test_packed_bytes_of_another_dtype_are_refused():
    with pytest.raises(ArtifactError, match=re.escape("found 6 of torch.int32")):
        unpack(torch.zeros(6, dtype=torch.int32), 3, (3, 5))


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "4", True], ids=repr)
def test_impossible_bits_are_refused(bits):
    with pytest.raises(PolicyError, match="expected an integer from 1 to 8"):
        pack(u8(0), bits)
    with pytest.raises(PolicyError, match="expected an integer from 1 to 8"):
        unpack(u8(0), bits, (1,))


@pytest.mark.parametrize("bits", [None, 32], ids=str)
def test_float_width_is_refused(bits):
    with pytest.raises(ArtifactError, match="expected 1 to 8 bits, found a float width"):
        pack(u8(0), bits)
    with pytest.raises(ArtifactError, match="expected 1 to 8 bits, found a float width"):
        unpack(u8(0), bits, (1,))


@pytest.mark.parametrize("count", [15, 16, 17, 100])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_large_tensors_are_packed_piece_by_piece(bits, count, monkeypatch):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "CHUNK", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert whole.tolist() == planes_in_plain_python(codes.tolist(), bits)
    assert torch.equal(unpack(whole, bits, (count,)), codes)
