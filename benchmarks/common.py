"""What every benchmark shares: where results go, and what a result says about the machine that made it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "onnx", "numpy")


def facts() -> dict[str, Any]:
    """Return machine, versions, commit, command and date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    script = str(Path(sys.argv[0]).resolve()).removeprefix(f"{ROOT}/")
    command = " ".join([Path(sys.executable).name, script, *_shown(sys.argv[1:])])
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),  # a copy of the tree is told
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **_accelerator()},
        "python": platform.python_version(),
        "versions": versions,
    }


def _accelerator() -> dict[str, str]:
    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: the facts and the result; whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**facts(), **result}, indent=1) + "\n")
    temporary.replace(path)
    return path


def read(name: str) -> dict[str, Any]:
    """Return an earlier result, or an empty dict."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _shown(arguments: list[str]) -> list[str]:
    """Paths shown by their last part: results say which file, not where it lay."""
    return [Path(a).name if "/" in a else a for a in arguments]


def told(error: BaseException | str, most: int = 300) -> str:
    """Return class and message of an error on one line, without paths of this machine and not longer than `most`."""
    text = " ".join(f"{type(error).__name__}: {error}".split()) if isinstance(error, BaseException) else error
    for folder in (ROOT, Path(torch.__file__).parents[1]):
        text = text.replace(f"{folder}/", "")
    return text[:most]
