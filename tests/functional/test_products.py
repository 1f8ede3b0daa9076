"""What the compiler needs of the bare products."""

from __future__ import annotations

import pytest

from daqconvert.functional.products import KNOWN, PaddedProducts

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("kind", [*KNOWN, PaddedProducts])
def test_products_have_a_hash_before_they_have_fields(kind):
    assert hash(kind.__new__(kind))  # dynamo of torch 2.11 asks for it then, where they are made in a forward
