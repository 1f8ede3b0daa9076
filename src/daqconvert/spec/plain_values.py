"""Converting frozen dataclasses to the plain values of JSON (objects, lists, texts, numbers, null) and back.

A dataclass becomes an object with a key for each field, a tuple becomes a list. A file may have been edited by hand,
so reading is strict: every field must be present and have its annotated type, no other field is allowed, and no
integer may be negative. An error names the path of the value, what was expected there and what was found.

A field that was `added` after the first files were written may be missing, and is written only where it has another
value than its default, so that files which an earlier version could have written stay the same.
"""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from daqconvert.errors import DaqError, PolicyError, nearest

_WORDS = {str: "a text", bool: "true or false", int: "a count", float: "a number", NoneType: "null"}

T = TypeVar("T")
_ADDED = "added"


def added(default: T) -> T:
    """Return the declaration of a dataclass's field that earlier files do not have.

    Example:
        >>> @dataclass
        ... class Point:
        ...     x: int
        ...     z: int = added(0)
        >>> to_plain(Point(1)), to_plain(Point(1, 2))
        ({'x': 1}, {'x': 1, 'z': 2})
    """
    declared: T = dataclasses.field(default=default, metadata={_ADDED: True})
    return declared


def to_plain(value: Any) -> Any:
    """Return a dataclass as nested dicts and lists; values that are neither dataclass nor tuple do not change.

    Example:
        >>> from daqconvert.spec import SiteOutput
        >>> to_plain(SiteOutput(readers=("fc",)))["readers"]
        ['fc']
    """
    if dataclasses.is_dataclass(value):
        fields = {field.name: (getattr(value, field.name), field) for field in dataclasses.fields(value)}
        kept = {name: v for name, (v, field) in fields.items() if _ADDED not in field.metadata or v != field.default}
        return {name: to_plain(v) for name, v in kept.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def from_plain(
    kind: type[T], value: object, where: str, *, error: type[DaqError] = PolicyError, later: Collection[str] = ()
) -> T:
    """Return the dataclass that `to_plain` wrote; raise for anything else.

    Args:
        kind: The class to return an instance of.
        value: What a JSON reader returned.
        where: Path of the value, for error messages.
        error: Class of the errors that are raised.
        later: Fields that may be missing, because older files were written before the fields existed.

    Raises:
        DaqError: Of the class `error`, if a field is missing, unknown or of the wrong type, or the dataclass itself
            refuses its fields.

    Example:
        >>> from daqconvert.spec import Call
        >>> from_plain(Call, {"function": "linear", "modules": [1]}, "call", later=("holder", "tensors", "dynamic"))
        Traceback (most recent call last):
        daqconvert.errors.PolicyError: call.modules[0]: expected a text; found 1.
    """
    found: T = _Reader(error, later).read_object(kind, value, where)
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads values of annotated types; each method takes the type, the value, and its path."""

    error: type[DaqError]
    later: Collection[str]

    def read_object(self, kind: Any, value: object, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise self.error(f"{where}: expected an object; found {reprlib.repr(value)}.")
        hints = get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        later = {field.name for field in dataclasses.fields(kind) if _ADDED in field.metadata} | {*self.later}
        for key in value:
            if key not in names:
                close = nearest(key, names) if isinstance(key, str) else ""
                raise self.error(f"{where}: unknown field {reprlib.repr(key)}.{close}")
        missing = [name for name in names if name not in value and name not in later]
        if missing:
            raise self.error(f"{where}: missing field {missing[0]!r}.")
        fields = {name: self.read(hints[name], value[name], f"{where}.{name}") for name in names if name in value}
        try:
            return kind(**fields)
        except self.error as problem:  # a message such as "w_bits: expected ..." gets the path in front
            field = str(problem).partition(":")[0]
            raise self.error(f"{where}{'.' if field in names else ': '}{problem}") from None

    def read(self, kind: Any, value: object, where: str) -> Any:
        if dataclasses.is_dataclass(kind):
            return self.read_object(kind, value, where)
        if isinstance(kind, UnionType):
            if value is None and NoneType in get_args(kind):
                return None
            members = [member for member in get_args(kind) if member is not NoneType]
            fitting = [member for member in members if _is_scalar(member, value)]
            return self.read(fitting[0] if fitting else members[0], value, where)
        if get_origin(kind) is tuple:
            if not isinstance(value, list):
                raise self.error(f"{where}: expected a list; found {reprlib.repr(value)}.")
            return tuple(self.read(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if get_origin(kind) is Mapping:
            if not isinstance(value, Mapping):
                raise self.error(f"{where}: expected an object; found {reprlib.repr(value)}.")
            return {key: self.read(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
        if kind is not Any and not _is_scalar(kind, value):
            raise self.error(f"{where}: expected {_WORDS[kind]}; found {reprlib.repr(value)}.")
        return value


def _is_scalar(kind: Any, value: object) -> bool:
    """Whether a value has the scalar type `kind`; a float may be written as an integer, and an int is 0 or more."""
    if kind is int:
        return type(value) is int and value >= 0
    if kind is float:
        return type(value) in (int, float)
    return kind in _WORDS and type(value) is kind
