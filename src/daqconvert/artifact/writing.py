"""The tensor file, written tensor by tensor: never more than one of them is packed at a time.

The bytes are those that the `safetensors` library writes, which takes all tensors at once and so would need them all
in memory: the header's length (8 bytes), the header (JSON, padded with spaces to a multiple of 8), the values, wider
dtypes first, equal ones by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daqconvert.artifact.manifest import TensorEntry
from daqconvert.functional.packing import pack

# in the order that they take in a file
_NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def write_tensors(file: Path, entries: Mapping[str, TensorEntry], state: Mapping[str, Tensor]) -> None:
    """Write the tensors of a state dict as a safetensors file, codes packed.

    Args:
        file: Where to.
        entries: What to write of each key; nothing of those that are the same as another.
        state: The tensors, codes not yet packed, on any device.

    Raises:
        ArtifactError: If a code does not fit in its bits.
    """
    stored = {key: entry for key, entry in entries.items() if entry.same_as is None}
    keys = sorted(stored, key=lambda key: (_ORDER[stored[key].dtype], key.encode()))
    header, at = {}, 0
    for key in keys:
        entry = stored[key]
        end = at + entry.stored_bytes
        header[key] = {"dtype": _NAMES[entry.dtype], "shape": [*entry.stored_shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for key in keys:
            stream.write(_bytes(state[key], stored[key].bits))


def _bytes(value: Tensor, bits: int | None) -> Any:
    """Return a tensor's values, packed where it is codes, little-endian and in row-major order."""
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if bits is not None:
        plain = pack(plain, bits)
    flat = torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain.reshape(-1)
    size = flat.element_size()
    raw = flat.view(torch.uint8)
    if sys.byteorder == "big" and size > 1:
        raw = raw.reshape(-1, size).flip(1).reshape(-1)
    return raw.numpy()  # a buffer, not a copy
