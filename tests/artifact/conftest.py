"""A frozen network and its artifact, made once; and a copy of the artifact for a test that damages it."""

import shutil

import pytest
import torch

import daqconvert as dq
from helpers.artifacts import frozen_of, small_network


@pytest.fixture(scope="session")
def batch():
    return (torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(5)),)


@pytest.fixture(scope="session")
def frozen(batch):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return frozen_of(small_network(), batch, w_bits=3, a_bits=4)


@pytest.fixture(scope="session")
def original(frozen, tmp_path_factory):
    return dq.save(frozen, tmp_path_factory.mktemp("original") / "artifact")


@pytest.fixture
def artifact(original, tmp_path):
    return shutil.copytree(original, tmp_path / "artifact")
