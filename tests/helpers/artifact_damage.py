"""Random damage to an artifact: to bytes, tensors, JSON or files.

`damage_...` leaves the checksums as they were; `forge_...` makes them fit, as an attacker would.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.artifacts import MANIFEST, TENSORS, read, reseal, write

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 8, 9, 255, 2**31, 2**40 - 1, 2**40, 2**63, 10**17, 10**30, 1e308, -0.0, 0.5,
    float("nan"), float("inf"), "", "0", "x" * 5000, "\0", "\x1b[2J", "\ud800", "../../etc/passwd", "/dev/zero",
    "__class__", "forward", "float16", "bfloat16", "float64", "int64", "uint8", "bool", "complex64", "object",
    "U8", "BOOL", "F4", "F6_E2M3", "F8_E8M0", "F16", "BF16", "I64", "C64", "midrise", "integer", "auto", "channel",
    "tensor", "Linear", "Conv2d", "timm:test_vit", "torchvision:resnet18", "os:system", "hf-hub:a/b", "pretrained",
    "checkpoint_path", "num_classes", [], {}, [[]], [0], [1], [2**39], [2**20] * 2, [1] * 20, {"a": 1},
    {"dtype": "float32", "shape": [2**30]}, {"dtype": "uint8", "shape": [2**36], "bits": 1},
)  # fmt: skip


def _deep(levels: int) -> Any:
    return [_deep(levels - 1)] if levels else []


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return every place in a JSON value, as a path of keys and indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in items for place in _places(item, (*path, key))]


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


def edit_json(body: Any, rng: random.Random) -> None:
    """Change a JSON value in one place."""
    places = _places(body)
    if not places:
        return
    # most places are in rows and tensors; every second time choose one of the few others
    few = [place for place in places if place[0] not in ("plan", "tensors")]
    place = rng.choice(few if few and rng.random() < 0.3 else places)
    parent, key = _at(body, place[:-1]), place[-1]
    kind = rng.choice(("value", "value", "number", "remove", "add", "exchange", "copy", "rename", "deep"))
    if kind == "number" and type(parent[key]) in (int, float):
        parent[key] += rng.choice((-1, 1, 0.5, 7, 2**20, 2**50))
    elif kind == "remove":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice([name for name in HOSTILE if isinstance(name, str)])] = rng.choice(HOSTILE)
    elif kind == "add":
        parent.insert(key, rng.choice(HOSTILE))
    elif kind in ("exchange", "copy"):
        other = rng.choice(places)
        mine, theirs = copy.deepcopy(parent[key]), copy.deepcopy(_at(body, other))
        parent[key] = theirs
        if kind == "exchange" and place != other[: len(place)] and other != place[: len(other)]:
            _at(body, other[:-1])[other[-1]] = mine
    elif kind == "rename" and isinstance(parent, dict):
        name = rng.choice(list(parent)) + rng.choice(("", "x", ".weight"))
        parent[name] = parent.pop(key)
    elif kind == "deep":
        parent[key] = _deep(rng.choice((3, 60)))
    else:
        parent[key] = copy.deepcopy(rng.choice(HOSTILE))


def edit_bytes(raw: bytearray, rng: random.Random) -> bytearray:
    """Change a file's bytes in one way."""
    at, length = rng.randrange(len(raw) or 1), rng.choice((1, 1, 8, 64, 500))
    kind = rng.choice(("flip", "flip", "flip", "truncate", "extend", "zero", "repeat", "exchange", "header"))
    if kind == "flip":
        for _ in range(rng.choice((1, 1, 2, 20))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del raw[at:]
    elif kind == "extend":
        raw += rng.randbytes(length)
    elif kind == "zero":
        raw[at : at + length] = bytes(len(raw[at : at + length]))
    elif kind == "repeat":
        raw[at:at] = raw[at : at + length]
    elif kind == "exchange":
        raw[at : at + length], raw[:length] = raw[:length], raw[at : at + length]
    else:
        raw[: min(8, len(raw))] = struct.pack("<Q", rng.choice((0, 1, 100, 10**6, 2**31, 2**63, 2**64 - 1)))[
            : len(raw)
        ]
    return raw


def damage_bytes(artifact: Path, rng: random.Random) -> None:
    """Change one file's bytes."""
    file = artifact / rng.choice((MANIFEST, TENSORS))
    file.write_bytes(edit_bytes(bytearray(file.read_bytes()), rng))


def damage_manifest(artifact: Path, rng: random.Random) -> None:
    """Change the manifest, and leave its checksum."""
    body = read(artifact)
    edit_json(body, rng)
    write(artifact, body, sign=False)


def forge_manifest(artifact: Path, rng: random.Random) -> None:
    """Change the manifest in one or two places, and make its checksum right."""
    body = read(artifact)
    for _ in range(rng.choice((1, 1, 2))):
        edit_json(body, rng)
    write(artifact, body)


def forge_bytes(artifact: Path, rng: random.Random) -> None:
    """Change the tensor file's bytes, and make size and checksums fit."""
    file = artifact / TENSORS
    file.write_bytes(edit_bytes(bytearray(file.read_bytes()), rng))
    reseal(artifact)


def forge_header(artifact: Path, rng: random.Random) -> None:
    """Change the tensor file's header as JSON: names, dtypes, shapes, offsets, tensors exchanged."""
    file = artifact / TENSORS
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    if rng.random() < 0.3:
        one, other = rng.sample(sorted(header), 2)
        header[one], header[other] = header[other], header[one]
    else:
        edit_json(header, rng)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    if rng.random() < 0.8:
        reseal(artifact)


def damage_files(artifact: Path, rng: random.Random) -> None:
    """Replace a file by something else, or exchange the two files."""
    file, other = rng.sample([artifact / MANIFEST, artifact / TENSORS], 2)
    content = file.read_bytes()
    kind = rng.choice(("missing", "folder", "pipe", "device", "loop", "other", "link", "empty", "exchange"))
    file.unlink()
    if kind == "folder":
        (file / "deep").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind in ("device", "loop", "other"):
        file.symlink_to({"device": Path("/dev/zero"), "loop": file, "other": other}[kind])
    elif kind == "link":
        (artifact / "elsewhere").write_bytes(content)
        file.symlink_to("elsewhere")
    elif kind == "empty":
        file.touch()
    elif kind == "exchange":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)


HONEST: tuple[Callable[[Path, random.Random], None], ...] = (damage_bytes, damage_manifest, damage_files)
SEALED: tuple[Callable[[Path, random.Random], None], ...] = (forge_manifest, forge_manifest, forge_bytes, forge_header)
