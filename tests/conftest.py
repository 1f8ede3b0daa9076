"""Fixtures for the tests: golden texts, the environment of a child process, the plan of a small network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from helpers.children import ROOT, environment

GOLDEN = ROOT / "tests" / "golden"


# Hypothesis: examples have no deadline and may be slow to make, so that a busy machine fails no test.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite-golden", action="store_true", help="write tests/golden/*.txt instead of comparing")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the repository."""
    return ROOT


@pytest.fixture
def golden_text(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a text with `tests/golden/<test>.txt`; `pytest --overwrite-golden` writes the file.

    Trailing blanks are ignored. A test with two texts gives the second one a name: `golden_text(text, "wide")`.
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
    return environment()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: a second one does not make a small network faster, and on a busy machine it makes it slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has forgotten what other tests compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def sites() -> tuple[Any, ...]:
    """Six layers: a first, a last, two convolutions and a linear between them, and one that cannot be converted."""
    from helpers.plans import SITES  # imported here, so that tests which do not need the package run if it is broken

    return SITES


@pytest.fixture
def planned() -> Callable[..., Any]:
    """Resolve a policy for the six layers, or for others."""
    from helpers.plans import planned

    return planned
