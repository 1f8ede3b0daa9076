"""Fixtures for the tests: golden texts, the environment of a child process, the plan of a small network."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite-golden", action="store_true", help="write tests/golden/*.txt instead of comparing")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture
def golden_text(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a text with `tests/golden/<test>.txt`; `pytest --overwrite-golden` writes the file.

    Trailing blanks do not count. A test with two texts gives the second a name: `golden_text(text, "wide")`.
    """

    def compare(text: str, name: str = "") -> None:
        stem = "-".join(filter(None, (request.node.name, name)))
        path = GOLDEN / (re.sub(r"[^\w.-]+", "-", stem).strip("-") + ".txt")
        found = "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"
        if request.config.getoption("--overwrite-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found, encoding="utf-8")
            return
        assert path.exists(), f"{path.name} is not there yet: look at the text, then run pytest --overwrite-golden"
        assert found == path.read_text(encoding="utf-8"), f"{path.name} differs; if meant, pytest --overwrite-golden"

    return compare


@pytest.fixture(scope="session")
def child_env() -> dict[str, str]:
    """Environment of a child process: this checkout's package, two threads, plain and wide terminal output."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "2",
        "COLUMNS": "160",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }


@pytest.fixture
def sites() -> tuple[Any, ...]:
    """Six layers: a first, a last, two convolutions and a linear between them, and one that cannot be converted."""
    from helpers.plans import SITES  # imported here: a broken package must not hide what the other tests have to say

    return SITES


@pytest.fixture
def planned() -> Callable[..., Any]:
    """Resolve a policy for the six layers, or for others."""
    from helpers.plans import planned

    return planned
