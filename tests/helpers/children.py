"""Child processes: their environment, and the time after which one counts as hanging."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HANGING = 1800.0
"""Seconds after which a child counts as hanging; far more than any takes, so that a busy machine fails no test."""


def environment(threads: int = 2, *, tests: bool = False) -> dict[str, str]:
    """Return an environment with this checkout's package, and plain and wide terminal output.

    With `tests` a child can import `helpers` as well.
    """
    own = [str(ROOT / "src"), *([str(ROOT / "tests")] if tests else [])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (*own, os.environ.get("PYTHONPATH", "")))),
        "OMP_NUM_THREADS": str(threads),
        "COLUMNS": "160",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }


def python(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS...` to its end; its output is kept as text."""
    command = [sys.executable, *map(str, arguments)]
    options = {"env": environment(), "capture_output": True, "text": True, "check": False, **options}
    return subprocess.run(command, timeout=HANGING, **options)
