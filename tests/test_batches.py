"""Batches that name their values: every verb takes each kind of them, and gives what it gives for a dict."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.batches import batch_size, split_batch, to_device
from daqconvert.errors import DataError


class Encoding(collections.UserDict):
    """Like Hugging Face's `BatchEncoding`: a `UserDict`, which is no dict, with a `to` of its own."""

    def to(self, device):
        return self


class ReadOnly(Mapping):
    """A mapping that cannot be written."""

    def __init__(self, values):
        self._values = dict(values)

    def __getitem__(self, key):
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


@dataclasses.dataclass
class Sample:
    """A batch as a dataclass."""

    x: Any
    scale: Any
    labels: Any = None


class Named(NamedTuple):
    """A batch as a named tuple, whose target is not its second entry."""

    x: Any
    scale: Any
    labels: Any


KINDS = {
    "ordered": collections.OrderedDict,
    "encoding": Encoding,
    "read-only": ReadOnly,
    "dataclass": lambda values: Sample(**values),
    "named-tuple": lambda values: Named(**values),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, scale):
        return self.last(torch.relu(self.first(x)) * scale)


def values():
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    return {"x": x, "scale": torch.rand(16, 1) + 0.5, "labels": (x[:, 0] > 0).long()}


@each_kind
def test_a_batch_is_taken_apart_by_names(kind):
    given = values()
    args, kwargs, target = split_batch(KINDS[kind](given))
    assert args == () and list(kwargs) == ["x", "scale"] and target is given["labels"]
    assert batch_size(KINDS[kind](given)) == 16


def test_a_named_tuple_of_two_has_one_input():
    pair = collections.namedtuple("pair", "image label")
    swapped = collections.namedtuple("swapped", "label image")
    plain = collections.namedtuple("plain", "image answer more")
    assert split_batch(pair(1, 2)) == split_batch(swapped(2, 1)) == split_batch(plain(1, 2, 3)) == ((1,), {}, 2)


@pytest.mark.parametrize("batch", [(), {1: torch.zeros(1)}, Sample, "text", None], ids=str)
def test_what_names_nothing_is_refused(batch):
    with pytest.raises(DataError, match="expected a tensor"):
        split_batch(batch)


@pytest.mark.parametrize("kind", ["ordered", "encoding", "dataclass", "named-tuple"])
def test_tensors_inside_are_moved_and_the_class_stays(kind):
    moved = to_device((KINDS[kind](values()),), torch.device("meta"))[0]
    assert type(moved) is type(KINDS[kind](values()))
    assert all(t.is_meta for t in split_batch(moved)[1].values())


@each_kind
def test_every_verb_takes_it(kind, tmp_path):
    make, given = KINDS[kind], values()
    inputs = {key: given[key] for key in ("x", "scale")}
    examples = make(inputs) if issubclass(type(make(given)), Mapping) else tuple(inputs.values())
    results = []
    for batch, example in ((make(given), examples), (given, inputs)):
        torch.manual_seed(0)
        qmodel = dq.quantize(Two().eval(), w_bits=4, a_bits=4, first={}, last={}, example_inputs=example)
        report = str(dq.calibrate(qmodel, [batch]))
        dq.finetune(qmodel, [batch], [batch], epochs=1, progress=False)
        frozen = dq.freeze(qmodel)
        path = tmp_path / f"{len(results)}.onnx"
        dq.export(frozen, path, example, check_batches=[batch])
        results.append((
            dq.plan(qmodel).macs, report, dq.evaluate(qmodel, [batch], progress=False).top1,
            str(dq.verify(frozen, qmodel, [batch])), [p.tolist() for p in qmodel.parameters()],
        ))  # fmt: skip
    assert results[0] == results[1] and results[0][2] is not None
