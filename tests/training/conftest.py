"""Fixtures from `helpers.clusters`: a network and loaders; a whole run; and one thread for a network this small."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from daqconvert.training.finetuning import FinetuneResult
from helpers.clusters import Breaking, float_model, make_loader, quantized_model
from helpers.written_runs import train


@pytest.fixture(scope="session")
def make() -> Callable[..., nn.Module]:
    return quantized_model


@pytest.fixture(scope="session")
def make_float() -> Callable[[], nn.Module]:
    return float_model


@pytest.fixture(scope="session")
def loader() -> Callable[..., DataLoader]:
    return make_loader


@pytest.fixture(scope="session")
def breaking() -> Callable[..., Breaking]:
    """A loader that breaks in its n-th pass."""

    def build(error: BaseException | None, at_pass: int, **options) -> Breaking:
        built = make_loader(Breaking, **options)
        built.error, built.at_pass = error, at_pass
        return built

    return build


@pytest.fixture(scope="session")
def val_loader() -> DataLoader:
    return make_loader(shuffle=False)


@pytest.fixture(scope="session")
def whole(make, loader, val_loader, tmp_path_factory) -> tuple[Path, FinetuneResult]:
    """A run of four epochs that was not interrupted: its directory and its result; not to be changed."""
    out, before = tmp_path_factory.mktemp("whole") / "run", torch.get_num_threads()
    torch.set_num_threads(1)  # as for the runs compared with it: `_one_thread` comes after this
    result = train(make, loader, val_loader, out)
    torch.set_num_threads(before)
    return out, result


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here uses one thread."""
