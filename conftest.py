"""For tests and doctests alike: the same random numbers and threads every time, and the names that examples use."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Keep torch from oversubscribing: parallel test processes get one thread each, a lone one at most two."""
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    torch.set_num_threads(min(2, os.cpu_count() or 1) if alone else 1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, so that it gives the same result alone and among others."""
    random.seed(0)
    np.random.seed(0)  # the global state, for that is what torchvision, timm and sklearn draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def example_names(request: pytest.FixtureRequest) -> None:
    """Let the examples in docstrings use `torch`, `nn` and `dq` without importing them."""
    if isinstance(request.node, pytest.DoctestItem):  # elsewhere a broken package must not hide what a test has to say
        import daqconvert as dq

        request.getfixturevalue("doctest_namespace").update(torch=torch, nn=torch.nn, dq=dq)
