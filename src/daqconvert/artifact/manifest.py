"""The manifest of an artifact, `daqconvert.json`: which model it is, how it was quantized, what the tensor file holds.

The file is one JSON object with exactly the fields of `Manifest` and a `checksum`: the SHA-256 of the object without
its checksum, written as JSON with sorted keys and no spaces. The checksum finds damage and careless edits. It is no
signature, so every field is checked as if it came from an attacker. A field `classes` that is None is left out.
`docs/artifact.md` specifies the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daqconvert.artifact.builders import check_source
from daqconvert.errors import ArtifactError, DaqError
from daqconvert.policy.plan_json import plan_from_dict, plan_to_dict
from daqconvert.spec import Plan

FORMAT, VERSION = "daqconvert-artifact", 1
MANIFEST, TENSORS = "daqconvert.json", "model.safetensors"
MOST_CLASSES = 100_000
LARGEST_MANIFEST = 16 << 20  # bytes; the manifest of a model with ten thousand layers is smaller
FLOATS = ("float64", "float32", "float16", "bfloat16")
DTYPES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1}
DTYPES |= {"uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1, "complex64": 8}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the model's state dict.

    Attributes:
        dtype: Name of the torch dtype.
        shape: Shape in the model.
        bits: Bits of codes that are stored packed; None for a tensor that is stored as it is.
        same_as: Key of the entry that holds the same tensor, so that nothing is stored for this one; None if there is
            no such entry.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int | None = None
    same_as: str | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the tensor file: that of the model, or one row of `bits * ceil(N / 8)` packed bytes."""
        return self.shape if self.bits is None else (self.bits * -(-math.prod(self.shape) // 8),)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the tensor file; 0 if another entry holds the same tensor."""
        return 0 if self.same_as is not None else math.prod(self.stored_shape) * DTYPES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """What an artifact says about itself.

    Attributes:
        format: Always `"daqconvert-artifact"`.
        version: Version of the format.
        daqconvert: Version of the package that wrote it.
        model: Class name of the model.
        source: What the model is rebuilt from, such as `"timm:resnet18"`; None if a skeleton has to be passed.
        source_kwargs: Arguments with which the source builds it.
        dtype: Dtype of the operands of the frozen layers.
        bytes: Size of the tensor file.
        sha256: SHA-256 of the tensor file.
        forwards: SHA-256 of the source code of every forward that is rewritten, by the full name of its class.
        tensors: Entry of each key of the state dict.
        plan: The plan from which the layers were made.
        classes: Names of the model's classes, by number of its outputs; None if they are not known.
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
    forwards: dict[str, str]
    tensors: dict[str, TensorEntry]
    plan: Plan
    classes: tuple[str, ...] | None = None

    def to_json(self) -> str:
        """Return the file's text: a line for each field, and the checksum."""
        body = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        body["plan"] = plan_to_dict(self.plan)
        if body["classes"] is None:
            del body["classes"]
        body["tensors"] = {
            key: {name: value for name, value in dataclasses.asdict(entry).items() if value is not None}
            for key, entry in self.tensors.items()
        }
        fields = {**body, "checksum": checksum(body)}.items()
        lines = ",\n".join(f'"{key}":{json.dumps(value, separators=(",", ":"))}' for key, value in fields)
        return f"{{\n{lines}\n}}\n"


def checksum(body: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's object without its checksum, as JSON with sorted keys and no spaces."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def largest_size(tensors: Mapping[str, TensorEntry]) -> int:
    """Return the largest size in the shapes of the tensors that take bytes."""
    return max((size for entry in tensors.values() if entry.stored_bytes for size in entry.shape), default=0)


def shown(value: object) -> str:
    """Return a value from a file as printable ASCII of at most 80 characters, for a message."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def told(error: Exception) -> str:
    """Return an error's message, which may quote the file, in at most 600 printable characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error)[:600])


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of an artifact directory.

    Args:
        path: The directory.

    Raises:
        ArtifactError: If the manifest is missing, damaged, edited, of another format or from a newer version; the
            message names the file and the field.
    """
    file = Path(path) / MANIFEST
    return parse_manifest(_content(file), str(file))


def parse_manifest(content: bytes, file: str) -> Manifest:
    """Check the bytes of a manifest and return what they say; `file` is what messages call it.

    Raises:
        ArtifactError: If anything is not as `docs/artifact.md` specifies; the message names the file and the field.
    """
    try:
        return _checked(_object(content, file), file)
    except RecursionError:
        raise ArtifactError(f"{file}: lists or objects are nested in one another hundreds of times.") from None


def _checked(body: dict[str, Any], file: str) -> Manifest:
    if body.get("format") != FORMAT:
        raise ArtifactError(f'{file}: expected an object with "format": "{FORMAT}".')
    version = body.get("version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{file}: version: expected a positive integer, found {shown(version)}.")
    if version > VERSION:
        raise ArtifactError(
            f"{file}: version {version} is newer than this daqconvert reads ({VERSION}). "
            "Upgrade: pip install -U daqconvert."
        )
    if body.pop("checksum", None) != checksum(body):
        raise ArtifactError(f"{file}: its checksum does not fit its contents: it was edited or damaged.")
    try:
        return _decode(body)
    except DaqError as error:
        raise ArtifactError(f"{file}: {told(error)}") from None


def _content(file: Path) -> bytes:
    directory = file.parent
    try:
        if not file.is_file():
            what = f"it holds no file {MANIFEST}" if directory.is_dir() else "no such directory"
            raise ArtifactError(f"{directory}: not an artifact: {what}. Make one with daqconvert.save(frozen, path).")
        with file.open("rb") as stream:
            return stream.read(LARGEST_MANIFEST + 1)
    except (OSError, ValueError) as error:  # ValueError: the path has a null character
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{shown(str(file))}: cannot be read ({told(error)}).") from None


def _object(content: bytes, file: str) -> dict[str, Any]:
    if len(content) > LARGEST_MANIFEST:
        raise ArtifactError(f"{file}: a manifest has at most {LARGEST_MANIFEST} bytes, this one has more.")
    strict: dict[str, Any] = {"parse_int": _integer, "parse_float": _finite, "parse_constant": _finite}
    try:
        body = json.loads(content.decode(), object_pairs_hook=_unique, **strict)
    except (ValueError, MemoryError) as error:
        raise ArtifactError(f"{file}: not readable as JSON ({told(error)}). It is truncated or damaged.") from None
    if not isinstance(body, dict):
        raise ArtifactError(f'{file}: expected an object with "format": "{FORMAT}".')
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"field {shown(twice)} stands there twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 18:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}")
    return value


def _decode(body: dict[str, Any]) -> Manifest:
    names = [f.name for f in dataclasses.fields(Manifest)]
    wrong = sorted(set(names) ^ ({"classes"} | set(body)))
    if wrong:
        raise ArtifactError(f"field {shown(wrong[0])} is {'missing' if wrong[0] in names else 'unknown'}.")
    for name, kind in {"source_kwargs": dict, "tensors": dict, "source": str | None}.items():
        if not isinstance(body[name], kind):
            raise ArtifactError(f"{name}: found {shown(body[name])}.")
    for name in ("daqconvert", "model"):
        if not isinstance(body[name], str) or not body[name].isprintable() or not 0 < len(body[name]) <= 200:
            raise ArtifactError(f"{name}: expected a short text, found {shown(body[name])}.")
    if body["dtype"] not in FLOATS:
        raise ArtifactError(f"dtype: expected one of {', '.join(FLOATS)}, found {shown(body['dtype'])}.")
    if type(body["bytes"]) is not int or body["bytes"] < 0:
        raise ArtifactError(f"bytes: expected a count, found {shown(body['bytes'])}.")
    if not _is_digest(body["sha256"]):
        raise ArtifactError(f"sha256: expected 64 hexadecimal digits, found {shown(body['sha256'])}.")
    _check_forwards(body["forwards"])
    classes = _classes(body["classes"]) if "classes" in body else None
    tensors = {key: _entry(key, value) for key, value in body["tensors"].items()}
    _check_aliases(tensors)
    needed = sum(entry.stored_bytes for entry in tensors.values())
    if needed > body["bytes"]:
        raise ArtifactError(f"tensors: they take {needed} bytes, the tensor file has {body['bytes']}.")
    check_source(body["source"], body["source_kwargs"], largest_size(tensors))
    _check_texts(body["plan"])
    return Manifest(**{**body, "tensors": tensors, "plan": plan_from_dict(body["plan"]), "classes": classes})


def _classes(value: object) -> tuple[str, ...]:
    ok = isinstance(value, list) and 0 < len(value) <= MOST_CLASSES
    if not ok or not all(isinstance(name, str) and name.isprintable() and 0 < len(name) <= 400 for name in value):  # type: ignore[attr-defined]
        raise ArtifactError(f"classes: expected a list of short texts that can be printed, found {shown(value)}.")
    return tuple(value)  # type: ignore[arg-type]


def _check_forwards(value: object) -> None:
    ok = isinstance(value, dict) and len(value) <= 10_000
    if not ok or not all(k.isprintable() and len(k) <= 400 and _is_digest(v) for k, v in value.items()):  # type: ignore[attr-defined]
        raise ArtifactError(f"forwards: expected names of classes with 64 hexadecimal digits, found {shown(value)}.")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _check_texts(value: object) -> None:
    """Raise unless all texts of a plan are printable: plans are printed, and terminals obey control characters."""
    if isinstance(value, str) and not value.isprintable():
        raise ArtifactError(f"plan: expected printable texts, found {shown(value)}.")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_texts(item)


def _entry(key: str, value: object) -> TensorEntry:
    where = f"tensors.{shown(key)[1:-1]}"
    if not isinstance(value, dict) or not {"dtype", "shape"} <= set(value) <= {"dtype", "shape", "bits", "same_as"}:
        raise ArtifactError(f"{where}: expected dtype, shape, and perhaps bits or same_as, found {shown(value)}.")
    shape, bits, same_as = value["shape"], value.get("bits"), value.get("same_as")
    sizes_ok = isinstance(shape, list) and len(shape) <= 16
    if not sizes_ok or not all(type(size) is int and 0 <= size < 2**40 for size in shape) or math.prod(shape) >= 2**48:
        raise ArtifactError(f"{where}.shape: expected a list of sizes, found {shown(shape)}.")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise ArtifactError(f"{where}.dtype: expected one of {', '.join(DTYPES)}, found {shown(value['dtype'])}.")
    if "bits" in value and (type(bits) is not int or not 1 <= bits <= 8 or value["dtype"] != "uint8"):
        raise ArtifactError(f"{where}.bits: expected 1 to 8 on a uint8 tensor, found {shown(bits)}.")
    if "same_as" in value and (not isinstance(same_as, str) or bits is not None):
        raise ArtifactError(f"{where}.same_as: expected a name, and no bits, found {shown(same_as)}.")
    return TensorEntry(value["dtype"], tuple(shape), bits, same_as)


def _check_aliases(tensors: dict[str, TensorEntry]) -> None:
    for key, entry in tensors.items():
        if entry.same_as is None:
            continue
        other = tensors.get(entry.same_as)
        if other is None or other.same_as is not None or (other.dtype, other.shape) != (entry.dtype, entry.shape):
            where = f"tensors.{shown(key)[1:-1]}.same_as"
            raise ArtifactError(f"{where}: {shown(entry.same_as)} is no stored tensor of that dtype and shape.")
