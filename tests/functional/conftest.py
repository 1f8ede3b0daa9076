"""What the tests of several operators need."""

from __future__ import annotations

import pytest

from daqconvert.functional import native


@pytest.fixture
def plain(monkeypatch):
    """Switch the compiled kernels off while it is called."""

    def without(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            return function(*args)

    return without
