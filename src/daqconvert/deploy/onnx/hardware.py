"""Whether ONNX Runtime adds products of 8-bit integers exactly on this machine: it depends on the processor.

An x86 processor without VNNI has one instruction for such sums, `vpmaddubsw`, which adds two products of a `uint8`
and an `int8` in 16 bits and saturates. ONNX Runtime uses it, for speed, where there is nothing better. A sum of two
products beyond 32,767 is then wrong, without a warning: 255 * 127 * 2 is such a sum, 15 * 127 * 2 is not. VNNI and AMX
add in 32 bits, and so does every kernel for Arm.

References: ONNX Runtime, "Quantize ONNX models", section "When and why do I need to try U8U8?",
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

X86 = ("x86_64", "amd64", "i386", "i686", "x86")
ARM = ("aarch64", "arm64")
EXACT = frozenset({"avx512vnni", "avxvnni", "amxint8"})  # without underscores: sources write them differently
SATURATES_ABOVE = 2**15 - 1
CPUINFO = Path("/proc/cpuinfo")


def exact_int8() -> bool | None:
    """Return whether 8-bit integer kernels add exactly on this machine, or None if that is unknown.

    Example:
        >>> exact_int8() in (True, False, None)
        True
    """
    machine = platform.machine().lower()
    if machine in ARM:
        return True
    if machine not in X86:
        return None
    found = features()
    return None if found is None else bool(found & EXACT)


def may_saturate(largest_input: int, largest_weight: int) -> bool:
    """Return whether a sum of two such products may exceed the 16 bits that x86 without VNNI has for it.

    `largest_input` is the largest `uint8` input code, zero point included, `largest_weight` the largest absolute
    `int8` weight.

    Example:
        >>> may_saturate(255, 127), may_saturate(255, 64), may_saturate(15, 127)
        (True, False, False)
    """
    return 2 * largest_input * largest_weight > SATURATES_ABOVE


def features() -> frozenset[str] | None:
    """Return the processor's features, in lower case and without underscores, or None if they are unknown.

    The sources are, in this order: torch (2.10 and later), `/proc/cpuinfo`, and `sysctl` on macOS.
    """
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        return _plain([name for name, there in ask().items() if there is True])
    if CPUINFO.is_file():
        lines = CPUINFO.read_text(errors="replace").splitlines()
        flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), None)
        return None if flags is None else _plain(flags.split())
    if platform.system() == "Darwin":
        return _sysctl()
    return None


def _sysctl() -> frozenset[str] | None:
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return _plain(done.stdout.split())


def _plain(names: list[str]) -> frozenset[str]:
    return frozenset(name.lower().replace("_", "") for name in names)
