"""The JSON half of an artifact: what stands in the other file, for which model, made by whom; strict and checksummed.

`daqconvert.json` is one object with exactly the fields of `Manifest`, and `checksum`, the SHA-256 of the same object
without it, as JSON with sorted keys and no spaces. The checksum finds damage and careless edits; it is no signature.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.errors import ArtifactError, DaqError
from daqconvert.policy.plan_json import plan_from_dict, plan_to_dict
from daqconvert.spec import Plan

FORMAT, VERSION = "daqconvert-artifact", 1
MANIFEST, TENSORS = "daqconvert.json", "model.safetensors"
LARGEST_MANIFEST = 64 << 20  # bytes; a manifest of a hundred thousand layers is smaller
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
DTYPES |= {"uint8": 1, "bool": 1, "complex64": 8, "complex128": 16}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the model's state dict.

    Attributes:
        dtype: Name of the torch dtype.
        shape: Shape in the model; what is stored is packed where `bits` is set.
        bits: Width of packed codes, or None.
        same_as: Key of an entry that holds the same tensor, or None; nothing is stored for this one then.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int | None = None
    same_as: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself.

    Attributes:
        format: Always `"daqconvert-artifact"`.
        version: Version of the format.
        daqconvert: Version of the package that wrote it.
        model: Class name of the model.
        source: Source string the model is rebuilt from, or None.
        source_kwargs: Arguments for it.
        dtype: Dtype of the model's floating parameters.
        bytes: Size of the tensor file.
        sha256: Of the tensor file.
        tensors: Entry of each key of the state dict.
        plan: The plan that made the layers.
    """

    format: str
    version: int
    daqconvert: str
    model: str
    source: str | None
    source_kwargs: dict[str, Any]
    dtype: str
    bytes: int
    sha256: str
    tensors: dict[str, TensorEntry]
    plan: Plan

    def to_json(self) -> str:
        """Return the file's text, checksum included."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["plan"] = plan_to_dict(self.plan)
        body["tensors"] = {
            key: {name: value for name, value in dataclasses.asdict(entry).items() if value is not None}
            for key, entry in self.tensors.items()
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1) + "\n"


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of an artifact directory.

    Args:
        path: The directory.

    Raises:
        ArtifactError: If it is missing, damaged, edited, of another format, or from a newer version; names the file
            and the field.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not file.is_file():
        what = "no such directory" if not directory.exists() else f"it holds no {MANIFEST}"
        raise ArtifactError(f"{directory}: not an artifact: {what}. Make one with daqconvert.save(frozen, path).")
    if file.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(f"{file}: {file.stat().st_size} bytes; a manifest has at most {LARGEST_MANIFEST}.")
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not readable as JSON ({error}). It is truncated or damaged.") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ArtifactError(f'{file}: expected an object with "format": "{FORMAT}".')
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{file}: version: expected a positive integer, found {version!r}.")
    if version > VERSION:
        raise ArtifactError(
            f"{file}: version {version} is newer than this daqconvert reads ({VERSION}). "
            "Upgrade: pip install -U daqconvert."
        )
    checksum = body.pop("checksum", None)
    if checksum != _checksum(body):
        raise ArtifactError(f"{file}: its checksum does not fit its contents: it was edited or damaged.")
    try:
        return _decode(body)
    except DaqError as error:
        raise ArtifactError(f"{file}: {error}") from None


def _decode(body: dict[str, Any]) -> Manifest:
    names = [f.name for f in dataclasses.fields(Manifest)]
    wrong = sorted(set(names) ^ set(body))
    if wrong:
        raise ArtifactError(f"field {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}.")
    kinds: dict[str, Any] = {"daqconvert": str, "model": str, "source": (str, type(None))}
    kinds |= {"source_kwargs": dict, "dtype": str, "bytes": int, "sha256": str, "tensors": dict}
    for name, kind in kinds.items():
        if not isinstance(body[name], kind) or isinstance(body[name], bool):
            raise ArtifactError(f"{name}: found {type(body[name]).__name__}.")
    if DTYPES.get(body["dtype"]) is None:
        raise ArtifactError(f"dtype: {body['dtype']!r} is not a dtype.")
    tensors = {key: _entry(key, value) for key, value in body["tensors"].items()}
    for key, entry in tensors.items():
        if entry.same_as is not None and (entry.same_as not in tensors or tensors[entry.same_as].same_as is not None):
            raise ArtifactError(f"tensors.{key}.same_as: {entry.same_as!r} is no stored tensor.")
    return Manifest(**{**body, "tensors": tensors, "plan": plan_from_dict(body["plan"])})


def _entry(key: str, value: object) -> TensorEntry:
    where = f"tensors.{key}"
    if not isinstance(value, dict) or not {"dtype", "shape"} <= set(value) <= {"dtype", "shape", "bits", "same_as"}:
        raise ArtifactError(f"{where}: expected dtype, shape, and perhaps bits and same_as.")
    shape, bits, same_as = value["shape"], value.get("bits"), value.get("same_as")
    sizes_ok = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not sizes_ok or len(shape) > 16 or math.prod(shape) >= 2**48:
        raise ArtifactError(f"{where}.shape: expected a list of sizes, found {str(shape)[:60]}.")
    if value["dtype"] not in DTYPES:
        raise ArtifactError(f"{where}.dtype: {str(value['dtype'])[:40]!r} is not a dtype.")
    if bits is not None and (type(bits) is not int or not 1 <= bits <= 8 or value["dtype"] != "uint8"):
        raise ArtifactError(f"{where}.bits: expected 1 to 8 on a uint8 tensor, found {bits!r}.")
    if same_as is not None and not isinstance(same_as, str):
        raise ArtifactError(f"{where}.same_as: expected a name, found {same_as!r}.")
    return TensorEntry(value["dtype"], tuple(shape), bits, same_as)


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
