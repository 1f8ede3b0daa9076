"""A library whose forward changed since an artifact was saved is refused by name."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import daqconvert as dq
from daqconvert.artifact.manifest import MANIFEST, checksum
from daqconvert.errors import ArtifactError


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.kernel = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(self.first(x).relu(), self.kernel)


NAME = f"{Functional.__module__}.Functional"


@pytest.fixture
def saved(tmp_path):
    qmodel, x = dq.quantize(Functional(), w_bits=4, a_bits=4), torch.randn(8, 4)
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    return dq.save(frozen, tmp_path / "artifact"), frozen(x), x


def edit(path, change):
    body = json.loads((path / MANIFEST).read_text())
    del body["checksum"]
    change(body)
    (path / MANIFEST).write_text(json.dumps({**body, "checksum": checksum(body)}))


def test_the_same_code_loads(saved):
    path, y, x = saved
    assert list(json.loads((path / MANIFEST).read_text())["forwards"]) == [NAME]
    assert torch.equal(dq.load(path, model=Functional())(x), y)


def test_changed_code_is_refused_by_name(saved, monkeypatch):
    def forward(self, x):
        return 2 * F.linear(self.first(x).relu(), self.kernel)

    monkeypatch.setattr(Functional, "forward", forward)
    with pytest.raises(ArtifactError, match=rf"forwards: {NAME} has another forward here"):
        dq.load(saved[0], model=Functional())


def test_a_forward_that_is_not_listed_is_refused(saved):
    edit(saved[0], lambda body: body["forwards"].clear())
    with pytest.raises(ArtifactError, match=rf"{NAME} is not among those"):
        dq.load(saved[0], model=Functional())


@pytest.mark.parametrize("value", [[], None, {"a": "b"}, {"a": None}, {"a\n": "0" * 64}], ids=repr)
def test_a_malformed_list_is_refused(saved, value):
    edit(saved[0], lambda body: body.update(forwards=value))
    with pytest.raises(ArtifactError, match="forwards: expected names of classes"):
        dq.load(saved[0], model=Functional())
