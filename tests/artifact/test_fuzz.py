"""Seeded random damage: each is refused with an `ArtifactError` that names the artifact, or loads to identical values.

Where the checksums were made right again (`damage.SEALED`), the artifact may also load to other values, if all of it
fits: the checksum is no signature. Then the model must be whole: every shape and width right, able to compute.
"""

import random
import resource
import shutil
import time
from collections import Counter

import pytest
import timm
import torch

import daqconvert as dq
from daqconvert.errors import ArtifactError
from daqconvert.layers.frozen_site import FrozenSite
from helpers import artifact_damage as damage
from helpers.artifacts import frozen_of, read, small_network

SECONDS, MEGABYTES = 10.0, 600  # of processor time for one load; of growth over all of them


@pytest.fixture(scope="module")
def rebuildable(tmp_path_factory):
    """An artifact that names its source, so that its model is built from what the manifest says."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    frozen = frozen_of(model, (torch.randn(1, 3, 32, 32),), w_bits=2, a_bits=4)
    path = tmp_path_factory.mktemp("timm") / "artifact"
    return frozen, dq.save(frozen, path, source="timm:test_resnet", source_kwargs={"num_classes": 10})


def attempt(path, model, frozen, batch, honest):
    """Load a damaged artifact; how it ended."""
    start = time.process_time()
    try:
        loaded = dq.load(path, model=model)
    except ArtifactError as error:
        message = str(error)
        assert str(path) in message and len(message) < 2000 and message.isprintable(), message[:3000]
        return "refused"
    finally:
        assert time.process_time() - start < SECONDS
    ours, theirs = loaded.state_dict(), frozen.state_dict()
    assert list(ours) == list(theirs)
    same = all(torch.equal(ours[key], value) for key, value in theirs.items()) and dq.plan(loaded) == dq.plan(frozen)
    assert same or not honest
    assert all(ours[key].shape == value.shape for key, value in theirs.items())
    if read(path)["dtype"] == "float32" and all(ours[key].dtype == theirs[key].dtype for key in ours):
        with torch.no_grad():
            assert loaded(*batch).shape == frozen(*batch).shape
    return "same" if same else "other"


def run(seeds, original, frozen, batch, rebuildable, tmp_path):
    """Damage, load, and count the ends by kind of damage."""
    ends = Counter()
    path, before = tmp_path / "artifact", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton, image = small_network(), (torch.randn(1, 3, 32, 32),)
    for seed in seeds:
        rng = random.Random(seed)
        honest = rng.random() < 0.4
        act = rng.choice(damage.HONEST if honest else damage.SEALED)
        built = act in (damage.forge_manifest, damage.damage_manifest) and rng.random() < 0.3
        shutil.copytree(rebuildable[1] if built else original, path)
        try:
            act(path, rng)
            told = (None, rebuildable[0], image) if built else (skeleton, frozen, batch)
            ends[act.__name__, attempt(path, *told, honest)] += 1
        except BaseException as error:
            error.add_note(f"seed {seed}, {act.__name__}, {'built' if built else 'skeleton'}")
            raise
        shutil.rmtree(path)
        assert not any(tmp_path.iterdir())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
    assert grown < MEGABYTES * 1024
    return ends


def check_ends(ends):
    """Each kind of damage was tried and refused; only sealed ones led to other values, and a few of them did."""
    for act in {*damage.HONEST, *damage.SEALED}:
        assert ends[act.__name__, "refused"] > 0
    assert not any(ends[act.__name__, "other"] for act in damage.HONEST)
    assert any(ends[act.__name__, "other"] for act in damage.SEALED)
    assert sum(count for (_, end), count in ends.items() if end == "refused") > 0.6 * ends.total()


def test_300_random_damages(original, frozen, batch, rebuildable, tmp_path):
    check_ends(run(range(300), original, frozen, batch, rebuildable, tmp_path))


@pytest.fixture(scope="module")
def integer(tmp_path_factory, batch):
    """The same of integer deployment: a network and its artifact, and one that names its source."""
    path = tmp_path_factory.mktemp("integer")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        frozen = frozen_of(small_network(), batch, w_bits=3, a_bits=4, deploy="integer")
        model = timm.create_model("test_resnet", num_classes=10).eval()
        built = frozen_of(model, (torch.randn(1, 3, 32, 32),), w_bits=2, a_bits=4, deploy="integer")
    for one in (frozen, built):
        assert any(m.is_integer for m in one.modules() if isinstance(m, FrozenSite))
    source = {"source": "timm:test_resnet", "source_kwargs": {"num_classes": 10}}
    return dq.save(frozen, path / "small"), frozen, (built, dq.save(built, path / "built", **source))


def test_300_random_damages_of_integer_deployment(integer, batch, tmp_path):
    original, frozen, rebuildable = integer
    check_ends(run(range(20_000, 20_300), original, frozen, batch, rebuildable, tmp_path))


@pytest.mark.slow
def test_10_000_random_damages(original, frozen, batch, rebuildable, tmp_path):
    check_ends(run(range(1_000, 11_000), original, frozen, batch, rebuildable, tmp_path))


@pytest.mark.slow
def test_10_000_random_damages_of_integer_deployment(integer, batch, tmp_path):
    original, frozen, rebuildable = integer
    check_ends(run(range(30_000, 40_000), original, frozen, batch, rebuildable, tmp_path))
