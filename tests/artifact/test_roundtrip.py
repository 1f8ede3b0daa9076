"""Saved and loaded: identical in every element, for every kind of model, width, dtype and way to rebuild it."""

from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

import daqconvert as dq
from daqconvert.errors import ArtifactError
from helpers import awkward_models as awkward
from helpers.artifacts import assert_same, frozen_of, shared_names, small_network
from helpers.cases import BY_ID, CASES, GEOMETRIES, SETTINGS, Case


def round_trip(make, batch, folder, **settings):
    """Through a file and into a skeleton with other values, in training mode, which does not change."""
    frozen = frozen_of(make(), batch, **settings)
    path = dq.save(frozen, folder / "artifact")
    torch.manual_seed(99)
    skeleton = make().train()
    with torch.no_grad():
        for value in (*skeleton.parameters(), *skeleton.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    before = {key: value.clone() for key, value in skeleton.state_dict().items()}
    loaded = dq.load(path, model=skeleton)
    assert_same(loaded, frozen, batch)
    assert skeleton.training and type(skeleton) is type(make()) and list(skeleton.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in skeleton.state_dict().items())
    return path, frozen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_awkward_models(case: Case, tmp_path):
    round_trip(case.make, case.batch(), tmp_path, w_bits=4, a_bits=4)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, batch, tmp_path):
    round_trip(awkward.Chain, batch, tmp_path, **SETTINGS[name])


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_widths(bits, granularity, batch, tmp_path):
    both = {"w_bits": bits, "a_bits": max(2, bits)}
    path, _ = round_trip(small_network, batch, tmp_path, **both, granularity=granularity, first=both, last=both)
    assert (path / "model.safetensors").stat().st_size < 8000


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_root_that_is_itself_a_layer(geometry, tmp_path):
    kind, args, kwargs, shape = GEOMETRIES[geometry]
    batch = (torch.randn(2, *shape),)
    for granularity in ("channel", "tensor"):
        settings = {"first": (3, 4), "last": (3, 4), "granularity": granularity}
        round_trip(partial(kind, *args, **kwargs), batch, tmp_path / granularity, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("skeleton_dtype", [None, torch.float32], ids=["same", "float32"])
def test_dtypes(dtype, skeleton_dtype, batch, tmp_path):
    model = small_network().to(dtype)
    batch = (batch[0].to(dtype),)
    frozen = frozen_of(model, batch, w_bits=4, a_bits=4, last=None)
    path = dq.save(frozen, tmp_path / "a")
    assert_same(dq.load(path, model=small_network().to(skeleton_dtype or dtype)), frozen, batch)


def test_one_layer_in_another_dtype_than_the_rest(batch, tmp_path):
    frozen = frozen_of(small_network(), batch, w_bits=4, a_bits=4)
    frozen[1].double()  # a batch norm may: it is stored as it is
    loaded = dq.load(dq.save(frozen, tmp_path / "a"), model=small_network())
    assert loaded.state_dict()["1.weight"].dtype == torch.float64
    frozen[7].half()
    with pytest.raises(dq.errors.ArtifactError, match="one dtype, found 7 in float16 and 3 in float32"):
        dq.save(frozen, tmp_path / "b")


class Buffers(nn.Module):
    """Every kind of buffer that a state dict can hold, and one that it leaves out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("index", torch.tensor([3, 1, 0, 2]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("empty", torch.zeros(0, 7))
        self.register_buffer("empty_too", torch.zeros(0, 7))
        self.register_buffer("no_items", torch.zeros(3, 0, dtype=torch.int32))
        self.register_buffer("wide", torch.tensor([7, 2**63], dtype=torch.uint64))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64).conj())
        self.register_buffer("same", self.index)
        self.register_buffer("window", torch.arange(12.0)[2:10:2])  # a view of something larger
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)  # not contiguous
        self.register_buffer("spread", torch.ones(1).expand(4))  # one element in memory
        self.register_buffer("beside", torch.tensor([2.0, 3.0, 4.0, 5.0]), persistent=False)
        self.frozen = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x):
        h = F.relu(self.a(x[..., self.index] * self.beside)) * self.mask + self.window
        return self.b(h), h * self.phase + self.frozen + self.spread, self.turned


def test_buffers(tmp_path):
    model, batch = Buffers(), (torch.randn(3, 4),)
    frozen = frozen_of(model, batch, w_bits=2, a_bits=3)
    skeleton = Buffers()
    skeleton.index, skeleton.mask = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
    loaded = dq.load(dq.save(frozen, tmp_path / "a"), model=skeleton)
    ours, theirs = loaded.state_dict(), frozen.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(torch.equal(a, b) for a, b in zip(loaded(*batch), frozen(*batch), strict=True))
    assert shared_names(loaded) == shared_names(frozen) == [["index", "same"]]
    assert "beside" not in ours and torch.equal(loaded.beside, model.beside)


def test_tied_weights_stay_tied(batch, tmp_path):
    case = BY_ID["tied-embedding"]
    model = case.make()
    frozen = frozen_of(model, case.batch(), w_bits=4, a_bits=4, exclude="head", last=None)
    path = dq.save(frozen, tmp_path / "a")
    untied = case.make()
    untied.head.weight = nn.Parameter(untied.head.weight.clone())
    for skeleton in (case.make(), untied):
        loaded = dq.load(path, model=skeleton)
        assert shared_names(loaded) == [["embed.weight", "head.weight"]]
        assert_same(loaded, frozen, case.batch())
    assert (path / "model.safetensors").stat().st_size < 8 + 1200 + 4 * (7 * 4 + 4 + 4 + 3) + 4 * 4


def test_signs_that_calibration_decided_are_restored(tmp_path):
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (torch.randn(8, 4),)
    frozen = frozen_of(model, batch, w_bits=4, a_bits=4)
    loaded = dq.load(dq.save(frozen, tmp_path / "a"), model=model)
    assert [row.signed for row in dq.plan(loaded)] == [True, True]
    frozen = frozen_of(model, (batch[0].abs(),), w_bits=4, a_bits=4)
    loaded = dq.load(dq.save(frozen, tmp_path / "b"), model=model)
    assert [row.signed for row in dq.plan(loaded)] == [row.signed for row in dq.plan(frozen)]
    assert dq.plan(loaded)["0"].signed is False


SOURCES = {
    "timm": ("timm:resnet18", {"num_classes": 10}, partial(timm.create_model, "resnet18", num_classes=10)),
    "timm, a list": (
        "timm:test_vit",
        {"img_size": [32, 64], "num_classes": 3, "act_layer": "relu"},
        partial(timm.create_model, "test_vit", img_size=(32, 64), num_classes=3, act_layer="relu"),
    ),
    "torchvision": (
        "torchvision:mobilenet_v3_small",
        {"num_classes": 7, "dropout": 0.5},
        partial(models.mobilenet_v3_small, num_classes=7, dropout=0.5),
    ),
    "not on meta": ("torchvision:regnet_y_400mf", {"num_classes": 4}, partial(models.regnet_y_400mf, num_classes=4)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, tmp_path):
    source, kwargs, make = SOURCES[name]
    batch = (torch.randn(1, 3, *kwargs.get("img_size", (32, 32))),)
    frozen = frozen_of(make().eval(), batch, w_bits=4, a_bits=4)
    path = dq.save(frozen, tmp_path / "a", source=source, source_kwargs=kwargs)
    state = torch.get_rng_state()
    loaded = dq.load(path)
    assert torch.equal(torch.get_rng_state(), state)  # its random start took nothing from the user's seed
    assert_same(loaded, frozen, batch)
    assert_same(dq.load(path, model=make()), frozen, batch)


def test_half_from_a_source(tmp_path):
    batch = (torch.randn(1, 3, 32, 32).half(),)
    frozen = frozen_of(timm.create_model("test_resnet").eval().half(), batch, w_bits=2, a_bits=4)
    assert_same(dq.load(dq.save(frozen, tmp_path / "a", source="test_resnet")), frozen, batch)


def test_a_skeleton_without_values(batch, frozen, original):
    with torch.device("meta"):
        skeleton = small_network()
    assert_same(dq.load(original, model=skeleton), frozen, batch)
    assert all(value.is_meta for value in skeleton.state_dict().values())


def test_a_skeleton_without_values_that_the_artifact_does_not_have(tmp_path):
    path = dq.save(frozen_of(Buffers(), (torch.randn(3, 4),)), tmp_path / "a")
    with torch.device("meta"):
        skeleton = Buffers()
    with pytest.raises(dq.errors.ArtifactError, match="beside is in no state dict.*skeleton on the CPU"):
        dq.load(path, model=skeleton)


def test_what_is_loaded_is_frozen(batch, original):
    loaded = dq.load(original, model=small_network())
    for verb in (
        lambda: loaded.train(),
        lambda: dq.quantize(loaded, w_bits=4),
        lambda: dq.calibrate(loaded, [batch]),
        lambda: dq.freeze(loaded),
        lambda: dq.finetune(loaded, [batch]),
    ):
        with pytest.raises(dq.errors.FrozenError, match="frozen"):
            verb()


def test_a_model_that_hides_its_codes_is_not_saved(frozen, batch, tmp_path):
    hiding = frozen_of(small_network(), batch)
    hiding._register_state_dict_hook(lambda module, state, *_: state.__delitem__("3.weight_codes"))
    with pytest.raises(dq.errors.ArtifactError, match="3.weight_codes: is not in the model's state dict"):
        dq.save(hiding, tmp_path / "a")


KINDS = {
    "complex128": torch.zeros(2, dtype=torch.complex128),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.zeros(2, device="meta"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_the_file_cannot_hold_is_named(kind, batch, tmp_path):
    frozen = frozen_of(small_network(), batch)
    frozen[1].register_buffer("odd", KINDS[kind])
    with pytest.raises(dq.errors.ArtifactError, match=f"1.odd: expected a dense tensor.*{kind}"):
        dq.save(frozen, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_no_tensor_is_named(tmp_path):
    frozen = frozen_of(nn.Sequential(nn.Linear(3, 3), Extra(3, 3)), (torch.randn(2, 3),))
    with pytest.raises(dq.errors.ArtifactError, match="1._extra_state: its extra state is no tensor"):
        dq.save(frozen, tmp_path / "a")


class Versioned(nn.Linear):
    """Asks for the version of its format when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_a_module_that_asks_for_the_version_of_its_format(tmp_path):
    model, x = nn.Sequential(Versioned(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4)
    qmodel = dq.quantize(model, w_bits=4, a_bits=4)
    dq.calibrate(qmodel, [x])
    frozen = dq.freeze(qmodel)
    assert torch.equal(dq.load(dq.save(frozen, tmp_path / "a"), model=model)(x), frozen(x))


def test_a_factory_builds_the_skeleton(artifact, frozen, batch):
    assert torch.equal(dq.load(artifact, model=small_network)(*batch), frozen(*batch))


@pytest.mark.parametrize(
    ("model", "message"),
    [("timm:resnet18", "expected a module, or a function that builds one, found str"),
     (lambda: 3, "expected a function that returns a module, found int")],
    ids=["text", "number"],
)  # fmt: skip
def test_what_builds_no_module_is_refused(artifact, model, message):
    with pytest.raises(ArtifactError, match=message):
        dq.load(artifact, model=model)
