"""The tensor file of an artifact, `model.safetensors`: codes as packed bit planes, every other tensor as it is.

The file is read by the `safetensors` library, but written here, one tensor after the other, so that only one packed
tensor is in memory at a time; the library would need all of them. The bytes are those that the library would write:
the header's length (8 bytes), the header (JSON, padded with spaces to a multiple of 8), the values, wider dtypes first
and tensors of one dtype by name.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from daqconvert.artifact.manifest import DTYPES, Manifest, TensorEntry, shown, told
from daqconvert.errors import ArtifactError
from daqconvert.functional.packing import pack, unpack
from daqconvert.layers.frozen_site import FrozenSite

# names of torch's dtypes in a safetensors file, in the order in which the file holds their tensors
_NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}


def collect(frozen: nn.Module) -> tuple[dict[str, TensorEntry], dict[str, Tensor]]:
    """Return the manifest's entries for a frozen model and its state dict; nothing is copied or packed yet.

    Raises:
        ArtifactError: If a value is no tensor, or of a kind that the tensor file cannot hold.
    """
    bits = {
        f"{name}.weight_codes".lstrip("."): module.settings.w_bits
        for name, module in frozen.named_modules(remove_duplicate=False)
        if isinstance(module, FrozenSite) and "weight_codes" in module._buffers
    }
    state = frozen.state_dict()
    lost = [key for key, width in bits.items() if width is not None and key not in state]
    if lost:
        raise ArtifactError(f"{lost[0]}: is not in the model's state dict; a hook renamed or removed it.")
    entries: dict[str, TensorEntry] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        dtype = _check_kind(key, value)
        shape, width = tuple(value.shape), bits.get(key)
        identity = (value.data_ptr(), value.device, dtype, shape, value.stride(), value.is_conj(), value.is_neg())
        same = seen.setdefault(identity, key) if value.numel() else key
        if same != key:
            entries[key] = TensorEntry(dtype, shape, same_as=same)
        else:
            entries[key] = TensorEntry(dtype, shape, bits=width)
    return entries, state


def _check_kind(key: str, value: object) -> str:
    if not isinstance(value, Tensor):
        raise ArtifactError(f"{key}: its extra state is no tensor ({type(value).__name__}) and cannot be saved.")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
        kind = "without values (on the meta device)" if value.is_meta else f"{value.layout} {dtype}"
        raise ArtifactError(f"{key}: expected a dense tensor of {', '.join(DTYPES)}, found one {kind}.")
    return dtype


def write_tensors(file: Path, entries: Mapping[str, TensorEntry], state: Mapping[str, Tensor]) -> None:
    """Write the tensors that `collect` returned, from any device, as a safetensors file with packed codes.

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
    """Return a buffer of a tensor's values, little-endian and in row-major order, packed if it is codes of `bits`."""
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if bits is not None:
        plain = pack(plain, bits)
    flat = torch.view_as_real(plain).reshape(-1) if plain.is_complex() else plain.reshape(-1)
    size = flat.element_size()
    raw = flat.view(torch.uint8)
    if sys.byteorder == "big" and size > 1:
        raw = raw.reshape(-1, size).flip(1).reshape(-1)
    return raw.numpy()  # no copy


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_tensors(file: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return the whole state dict, on the CPU, with codes unpacked; keys that shared a tensor share one again.

    Size and checksum of the file, and the names in it, are compared with the manifest before any value is read.

    Raises:
        ArtifactError: If the file is missing, truncated or edited, or does not hold exactly what the manifest says.
    """
    try:
        _check_file(file, manifest)
        state = _read(file, {key: entry for key, entry in manifest.tensors.items() if entry.same_as is None})
    except ArtifactError:
        raise
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise ArtifactError(f"{file}: not readable as safetensors ({told(error)}).") from None
    return {key: state[entry.same_as or key] for key, entry in manifest.tensors.items()}


def _check_file(file: Path, manifest: Manifest) -> None:
    if not file.is_file():
        raise ArtifactError(f"{file}: missing, or no file. The artifact is incomplete; save it again.")
    size = file.stat().st_size
    if size != manifest.bytes:
        raise ArtifactError(f"{file}: expected {manifest.bytes} bytes, found {size}: truncated or replaced.")
    if sha256(file) != manifest.sha256:
        raise ArtifactError(f"{file}: its SHA-256 is not the one in the manifest: damaged or edited. Save it again.")


def _read(file: Path, stored: dict[str, TensorEntry]) -> dict[str, Tensor]:
    with safe_open(str(file), framework="pt") as reader:
        difference = sorted(set(reader.keys()) ^ set(stored))
        if difference:
            raise ArtifactError(f"{file}: tensor {shown(difference[0])} stands in only one of file and manifest.")
        found = {}
        for key, entry in stored.items():
            value = reader.get_tensor(key)
            if tuple(value.shape) != entry.stored_shape or str(value.dtype) != f"torch.{entry.dtype}":
                raise ArtifactError(
                    f"{file}: {shown(key)}: expected {entry.dtype} {entry.stored_shape}, "
                    f"found {str(value.dtype)[6:]} {tuple(value.shape)}."
                )
            # NOTE: a copy, because the reader's tensor is a view of the file, and the model would change with the file
            found[key] = value.clone() if entry.bits is None else unpack(value, entry.bits, entry.shape)
        return found
