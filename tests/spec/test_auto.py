"""What "auto" means, as a whole table, and the settings that no quantizer can have."""

import itertools

import pytest

from daqconvert.errors import PolicyError
from daqconvert.spec import Settings
from daqconvert.spec.auto import MIDRISE_UP_TO_BITS, NORMALIZE_UP_TO_BITS, resolve_auto

BITS = [None, *range(1, 9)]


@pytest.mark.parametrize("w_bits", BITS)
def test_auto_by_bits(w_bits):
    settled = resolve_auto(Settings(w_bits=w_bits))
    low = w_bits is not None and w_bits <= NORMALIZE_UP_TO_BITS
    assert settled.normalize is low
    assert settled.grid == ("midrise" if low or w_bits in range(1, MIDRISE_UP_TO_BITS + 1) else "integer")


@pytest.mark.parametrize(
    ("asked", "grid", "normalize"),
    [
        pytest.param({"w_bits": 1, "normalize": False}, "midrise", False, id="1 bit has no other grid"),
        pytest.param({"w_bits": 4, "normalize": True}, "midrise", True, id="normalized means mid-rise"),
        pytest.param({"w_bits": 2, "grid": "integer"}, "integer", False, id="integer means not normalized"),
        pytest.param({"w_bits": 2, "normalize": False}, "integer", False, id="not normalized"),
        pytest.param({"w_bits": 8, "grid": "midrise"}, "midrise", False, id="mid-rise alone does not normalize"),
        pytest.param({"w_bits": None, "grid": "integer", "normalize": True}, "integer", True, id="a float weight"),
    ],
)
def test_what_is_asked_stays_and_the_rest_follows(asked, grid, normalize):
    settled = resolve_auto(Settings(**asked))
    assert (settled.grid, settled.normalize) == (grid, normalize)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param(
            {"w_bits": 1, "grid": "integer"},
            'policy.toml: layer conv1 (rule 2: "conv*"): grid = "integer" has no level but 0 at w_bits = 1. '
            'Set grid = "midrise" or "auto", or w_bits to 2 or more.',
            id="1 bit on the integer grid",
        ),
        pytest.param(
            {"w_bits": 4, "grid": "integer", "normalize": True},
            'policy.toml: layer conv1 (rule 2: "conv*"): normalize = true needs grid = "midrise"; found grid = '
            '"integer". Set grid = "midrise" or "auto", or normalize = false.',
            id="normalized on the integer grid",
        ),
    ],
)
def test_impossible_settings(asked, message):
    with pytest.raises(PolicyError) as caught:
        resolve_auto(Settings(**asked), 'policy.toml: layer conv1 (rule 2: "conv*")')
    assert str(caught.value) == message


def test_nothing_is_left_on_auto_and_settling_twice_changes_nothing():
    for w_bits, grid, normalize in itertools.product(BITS, ("auto", "midrise", "integer"), ("auto", True, False)):
        try:
            settled = resolve_auto(Settings(w_bits=w_bits, grid=grid, normalize=normalize, granularity="tensor"))
        except PolicyError:
            assert grid == "integer"
            continue
        assert settled.grid in ("midrise", "integer")
        assert isinstance(settled.normalize, bool)
        assert settled.granularity == "tensor"
        assert resolve_auto(settled) == settled
