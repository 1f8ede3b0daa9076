"""Bit packing for codes of 1 to 8 bits, at any length: bit planes, each plane packed eight elements to a byte.

Convention: `N` codes of `b` bits become `b * ceil(N / 8)` bytes. Plane 0 holds the least significant bits and comes
first; in a plane, element `i` is bit `i % 8` (counted from the least significant) of byte `i // 8`; the bits after
the last element are zero. The same bytes are in the saved artifact and in the ONNX file, where `BitwiseAnd`
takes them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from daqconvert.errors import ArtifactError
from daqconvert.spec import check_bits

CHUNK = 1 << 18  # codes that are unpacked at once, a multiple of 8: a large weight needs no large temporaries


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take: `bits * ceil(count / 8)`.

    Example:
        >>> packed_size(10, 3)
        6
    """
    return bits * ((count + 7) // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bit planes.

    Args:
        codes: uint8, any shape, each in `0 .. 2**bits - 1`; taken in row-major order.
        bits: 1 to 8.

    Returns:
        uint8 of shape `(bits * ceil(N / 8),)`.

    Raises:
        ArtifactError: If the codes are not uint8, or one does not fit.
        PolicyError: If `bits` is not 1 to 8.

    Example:
        >>> pack(torch.tensor([1, 0, 3], dtype=torch.uint8), 2).tolist()
        [5, 4]
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ArtifactError(f"pack: expected codes of dtype uint8, found {codes.dtype}. Call codes.to(torch.uint8).")
    flat = codes.reshape(-1)
    if bits < 8 and flat.numel() and int(flat.max()) >> bits:
        raise ArtifactError(f"pack: code {int(flat.max())} does not fit in {bits} bits (0 to {2**bits - 1}).")
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    planes = torch.empty(bits, packed_size(flat.numel(), 1), dtype=torch.uint8, device=codes.device)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        part = torch.nn.functional.pad(part, (0, -part.numel() % 8)).reshape(-1, 8)
        for bit in range(bits):
            into = planes[bit, start // 8 : start // 8 + len(part)]
            torch.sum(((part >> bit) & 1) * weights, dim=1, dtype=torch.uint8, out=into)
    return planes.reshape(-1)


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 of shape `(bits * ceil(N / 8),)`.
        bits: 1 to 8.
        shape: Shape of the codes, `N` elements.

    Returns:
        uint8 codes of that shape.

    Raises:
        ArtifactError: If the number of bytes is not what `shape` and `bits` need.
        PolicyError: If `bits` is not 1 to 8.

    Example:
        >>> unpack(torch.tensor([5, 4], dtype=torch.uint8), 2, (3,)).tolist()
        [1, 0, 3]
    """
    _check_bits(bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(count, bits):
        raise ArtifactError(
            f"unpack: expected {packed_size(count, bits)} bytes of uint8 for {tuple(shape)} at {bits} bits, "
            f"found {packed.numel()} of {packed.dtype}."
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = packed.reshape(bits, -1)
    codes = torch.zeros((planes.shape[1], 8), dtype=torch.uint8, device=packed.device)
    for start in range(0, len(codes), CHUNK // 8):
        part = slice(start, start + CHUNK // 8)
        for bit in range(bits):
            codes[part] |= ((planes[bit, part, None] >> shifts) & 1) << bit
    return codes.reshape(-1)[:count].reshape(tuple(shape))


def _check_bits(bits: int) -> None:
    if check_bits("bits", bits) is None:
        raise ArtifactError("packing: expected 1 to 8 bits, found a float width.")
