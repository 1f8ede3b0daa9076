"""One thread for networks this small, and a compiler that forgets between tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread; on a busy machine, for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Let no test see what another one compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
