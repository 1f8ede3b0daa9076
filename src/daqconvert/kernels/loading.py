"""Loads the compiled kernels, once per process, from the cache, where they are built at first use.

`DAQCONVERT_KERNELS=0` switches them off. Then, and without a compiler, everything runs in plain torch, with the same
values; the log says so once.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # noqa: F401 # loads the OpenMP library that the kernels then share

from daqconvert.kernels.build import BuildError, build, compiler, library_path

LOGGER = logging.getLogger("daqconvert.kernels")

_FLOATS, _BYTES = c_void_p, c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "daq_input_parameters": (None, [_FLOATS, _FLOATS, c_float, _FLOATS, _FLOATS]),
    "daq_quantize_input": (None, [_FLOATS, _FLOATS, _BYTES, c_int64, _FLOATS, _FLOATS, c_float, c_int]),
    "daq_quantize_input_backward": (
        None,
        [_FLOATS] * 4 + [c_int64] + [_FLOATS] * 6 + [c_float, _FLOATS, c_int, c_int],
    ),
    "daq_expand_input": (None, [_BYTES, _FLOATS, c_int64, _FLOATS, c_int]),
    "daq_fingerprint": (c_uint64, [_FLOATS, c_int64, _FLOATS, _FLOATS, c_int64, c_int]),
    "daq_quantize_weight": (
        None,
        [_FLOATS, _FLOATS, _BYTES, c_void_p, *[_FLOATS] * 4, c_float, c_float, c_int, c_int],
    ),
    "daq_quantize_weight_backward": (
        None,
        [_FLOATS] * 3 + [c_void_p, *[_FLOATS] * 6, c_float, c_float, c_int, _FLOATS, c_int, c_int],
    ),
    "daq_expand_weight": (None, [_BYTES, _FLOATS, c_void_p, c_float, c_float, _FLOATS, c_int, c_int]),
    "daq_scale_weight_gradient": (
        None,
        [_FLOATS, _BYTES, c_void_p, c_float, c_float, _FLOATS, _FLOATS, c_int, c_int],
    ),
    "daq_combine_scale": (None, [_FLOATS] * 4 + [c_int64, c_float, c_float, c_float]),
    "daq_combine_scale_backward": (None, [_FLOATS] * 7 + [c_int64, c_float, c_float, c_float]),
    "daq_rescale": (
        None,
        [_FLOATS, _FLOATS, c_int64, c_int64, c_int64, _FLOATS, c_int, _FLOATS, c_int],
    ),
    "daq_requantize": (
        None,
        [_FLOATS, _FLOATS, c_int64, c_int64, c_int64, c_void_p, c_void_p, _FLOATS, c_float, c_float, c_float, c_int],
    ),
}


@dataclass(frozen=True)
class Status:
    """How the elementwise arithmetic runs on the CPU.

    Attributes:
        compiled: Whether the compiled kernels do it.
        reason: Why the kernels are not used, or the file that they were loaded from.
        seconds: How long building them took; 0 where the cache had them.
    """

    compiled: bool
    reason: str
    seconds: float = 0.0


_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, Status] | None = None


def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, building them at first use; None where there are none."""
    found = _loaded
    return found[0] if found is not None else _first_use()[0]


def status() -> Status:
    """Return whether the compiled kernels are in use, and why not.

    Example:
        >>> isinstance(status().compiled, bool)
        True
    """
    return (_loaded or _first_use())[1]


def _first_use() -> tuple[ctypes.CDLL | None, Status]:
    global _loaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
            if not _loaded[1].compiled:
                LOGGER.warning("no compiled kernels (%s); training runs in plain torch, slower", _loaded[1].reason)
            elif _loaded[1].seconds:
                said = f"built kernels in {_loaded[1].seconds:.1f} s, kept as {_loaded[1].reason}"
                LOGGER.info(said)
                if sys.stderr.isatty():  # tell the user why the command took so long
                    sys.stderr.write(f"daqconvert: {said}\n")
        return _loaded


def _load() -> tuple[ctypes.CDLL | None, Status]:
    if os.environ.get("DAQCONVERT_KERNELS") == "0":
        return None, Status(False, "switched off by DAQCONVERT_KERNELS=0")
    cxx = compiler()
    if cxx is None:
        return None, Status(False, "no C++ compiler found; install one, or set CXX")
    try:
        path, start = library_path(cxx), time.perf_counter()
        if path.is_file():
            try:
                return _open(path), Status(True, str(path))
            except (OSError, AttributeError):  # the file is cut off, or for another system: build it again
                path.unlink(missing_ok=True)
        build(cxx, path)
        return _open(path), Status(True, str(path), time.perf_counter() - start)
    except (BuildError, OSError, AttributeError) as error:
        return None, Status(False, str(error))


def _open(path: Path) -> ctypes.CDLL:
    """Load the file and declare its functions."""
    found = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
