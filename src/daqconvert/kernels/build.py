"""Builds `quantizer.cpp` once per source, compiler and processor, and keeps the result in the user's cache.

The build goes to a temporary file, which is then renamed. So any number of processes may build at once: the last file
stays, and all of them have the same contents.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("quantizer.cpp")
# NOTE: nothing here lets the compiler change a value: no -ffast-math, no contraction into fused multiply-adds
EXACT = ("-O3", "-std=c++17", "-fPIC", "-shared", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
# the first that compiles is used; with OpenMP, kernels and torch share threads, because both load the same library
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"), ("-fopenmp",), ())
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 120.0  # seconds for one attempt


class BuildError(Exception):
    """No library could be built; the message says why in one line."""


def compiler() -> str | None:
    """Return the C++ compiler to use: `$CXX`, else the first of `COMPILERS` on the path, or None."""
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, COMPILERS)), None)


def cache_directory() -> Path:
    """Return where built files are kept: `$DAQCONVERT_CACHE`, else `daqconvert` in the user's cache."""
    asked = os.environ.get("DAQCONVERT_CACHE")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "daqconvert"


def library_path(cxx: str) -> Path:
    """Return the path of the library that is built for this source, compiler and processor."""
    stat = Path(cxx).resolve().stat()
    parts = [SOURCE.read_bytes(), cxx.encode(), f"{stat.st_size} {stat.st_mtime_ns}".encode(), _processor().encode()]
    parts.append(repr((EXACT, VARIANTS)).encode())
    return cache_directory() / f"quantizer-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def build(cxx: str, path: Path) -> None:
    """Compile the source to `path` with the compiler `cxx`, making the directory.

    Raises:
        BuildError: If no variant of the flags compiles, or the directory cannot be written.
    """
    said = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
            target = Path(folder) / path.name
            for variant in VARIANTS:
                command = [cxx, *EXACT, *variant, str(SOURCE), "-o", str(target)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
                if done.returncode == 0:
                    target.replace(path)
                    return
                said = said or next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-200:])
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{cxx} could not build into {path.parent}: {error}") from error
    raise BuildError(f"{cxx} failed: {said.strip()}")


def _processor() -> str:
    """Return a text that tells this machine's processor from others: several machines may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    wanted = ("model name", "flags", "Features")
    found = [next((line for line in lines if line.startswith(key)), "") for key in wanted]
    return "|".join([platform.system(), platform.machine(), platform.processor(), *found])
