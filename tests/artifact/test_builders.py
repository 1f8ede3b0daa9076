"""What an artifact may say about rebuilding its model: no file, no network, no code of its own, nothing large."""

import pickle
import shutil
import sys
import time

import pytest
import timm
import torch
from torch import nn

import daqconvert as dq
from daqconvert.artifact.builders import HARMLESS, check_source
from daqconvert.errors import ArtifactError
from helpers.artifacts import edit, frozen_of, put, read, refused, small_network
from helpers.children import python


@pytest.fixture(scope="module")
def from_timm(tmp_path_factory):
    """An artifact of `timm:test_resnet` with ten classes."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    frozen = frozen_of(model, (torch.randn(1, 3, 32, 32),), w_bits=2, a_bits=4)
    path = tmp_path_factory.mktemp("timm") / "artifact"
    return dq.save(frozen, path, source="timm:test_resnet", source_kwargs={"num_classes": 10})


@pytest.fixture
def rebuilt(from_timm, tmp_path):
    """A copy whose manifest a test may edit: a call with the new arguments edits and loads it."""
    path = shutil.copytree(from_timm, tmp_path / "artifact")

    def load(kwargs, source=None):
        edit(path, lambda body: body.update(source=source or body["source"], source_kwargs=kwargs))
        return dq.load(path)

    return load


# Arguments that make a builder of timm's or torchvision's read a file, download, choose a device, or call something
HOSTILE = {
    "pretrained": True,
    "checkpoint_path": "weights",
    "pretrained_cfg": "a1_in1k",
    "pretrained_cfg_overlay": [],
    "pretrained_strict": False,
    "pretrained_filter_fn": "eval",
    "pretrained_backbone": True,
    "cache_dir": "x",
    "weights": "DEFAULT",
    "weights_backbone": "DEFAULT",
    "checkpoint": "weights",
    "model_cfg": "x",
    "feature_cfg": "x",
    "cfg": "x",
    "pruned": True,
    "device": "cuda",
    "dtype": "float16",
    "head_fn": "eval",
    "hf_hub_id": "x",
    "custom_load": True,
    "state_dict": "x",
    "file": "x",
    "url": "x",
    "model_dir": "x",
    "__class__": 1,
    "Path": 1,
    "num classes": 1,
    "num_classes\n": 1,
    "": 1,
    "näme": 1,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arguments(rebuilt, name):
    with pytest.raises(ArtifactError, match="source_kwargs.*passes a builder no argument of this name"):
        rebuilt({"num_classes": 10, name: HOSTILE[name]})
    with pytest.raises(ArtifactError, match="passes a builder no argument of this name"):
        check_source("timm:resnet18", {name: HOSTILE[name]}, 10)


def test_no_file_is_unpickled(rebuilt, tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    for name in ("checkpoint_path", "checkpoint", "pretrained_cfg", "weights"):
        with pytest.raises(ArtifactError):
            rebuilt({name: "weights"})
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_arguments_that_only_shape_the_model(name):
    check_source("timm:resnet18", {name: 1}, 10)


VALUES = {
    "a path": ("a/b", "expected a text of letters"),
    "an address": ("https://a.b/c", "expected a text of letters"),
    "a dotted name": ("os.system", "expected a text of letters"),
    "long": ("x" * 65, "expected a text of letters"),
    "a newline": ("gelu\n", "expected a text of letters"),
    "an object": ({"a": 1}, "expected a number, text, boolean, null or list"),
    "an object in a list": ([[{"a": 1}]], r"kw\[0\]\[0\]: expected a number, text, boolean, null or list"),
    "deep": ([[[[[[1]]]]]], "lists of at most 4 levels"),
    "many": ([1] * 300, "at most 256 values"),
    "large": (10**12, "neither up to 4096 nor up to the largest size of a stored tensor"),
    "very large": (10**400, "neither up to 4096"),
    "small": (-5000.0, "neither up to 4096"),
    "infinite": (float("inf"), "neither up to 4096"),
    "no number": (float("nan"), "neither up to 4096"),
}


@pytest.mark.parametrize("name", VALUES)
def test_hostile_values(name):
    value, told = VALUES[name]
    with pytest.raises(ArtifactError, match=f"source_kwargs.kw.*{told}" if "kw" not in told else told):
        check_source("timm:resnet18", {"kw": value}, 10)


def test_a_number_as_large_as_a_stored_size_is_believed():
    check_source("timm:resnet18", {"num_classes": 21843}, 21843)
    with pytest.raises(ArtifactError, match="num_classes: 21843 is neither"):
        check_source("timm:resnet18", {"num_classes": 21843}, 21842)


@pytest.mark.parametrize(
    "source",
    [
        "os:system",
        "module:function",
        "hf-hub:timm/resnet18",
        "timm:hf-hub:timm/resnet18",
        "timm:../../x",
        "timm:resnet18\0",
        "timm:",
        "torchvision:",
        ":",
        "",
        "x" * 100_000,
        "https://a.b/c",
        "local-dir:x",
    ],
    ids=lambda source: ascii(source[:20]),
)
def test_hostile_sources(rebuilt, source):
    with pytest.raises(ArtifactError, match="source: .*names only timm:NAME or torchvision:NAME") as told:
        rebuilt({}, source=source or " ")
    assert len(str(told.value)) < 500 and str(told.value).isprintable()


def test_a_module_named_by_the_file_is_never_imported(rebuilt, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for source in ("intruder:build", "timm:intruder", "torchvision:intruder", "intruder"):
        with pytest.raises(ArtifactError):
            rebuilt({}, source)
    assert "intruder" not in sys.modules


BUILDS = {
    "unknown name": ("timm:resnet19", {}, "timm has no model 'resnet19'"),
    "unknown tag": ("timm:resnet18.x_in1k", {}, "no weights 'x_in1k'"),
    "unknown argument": (None, {"classes": 10}, "could not be built here"),
    "own argument": (None, {"source": "x"}, "could not be built here"),
    "builder's argument": (None, {"model_name": "x"}, "could not be built here"),
    "wrong type": (None, {"num_classes": "x"}, "could not be built here"),
    "negative": (None, {"num_classes": -1}, "could not be built here|'fc': expected"),
    "other classes": (None, {"num_classes": 11}, r"'fc': expected a weight of shape \(10, \d+\), found \(11, \d+\)"),
    "no head": (None, {"num_classes": 0}, "'fc': expected a float Linear, found a Identity"),
    "features": (None, {"features_only": True}, "model: expected a ResNet, found a FeatureListNet"),
    "another model": ("timm:test_vit", {}, "model: expected a ResNet, found a VisionTransformer"),
    "larger than stored": ("timm:test_vit", {"embed_dim": 4096, "num_heads": 4096, "depth": 4096}, "larger than the"),
    "torchvision, larger": ("torchvision:vit_b_16", {"num_layers": 4096, "num_classes": 4096}, "built here"),
    "endless": ("timm:resnet18", {"layers": [4096] * 4}, "multiple values|larger than the stored tensors"),
    "wide": ("timm:test_resnet", {"base_width": 4096, "cardinality": 4096}, "built here|expected a weight"),
    "beside the state dict": ("timm:swin_tiny_patch4_window7_224", {"img_size": 4096, "window_size": 1024}, "beside"),
}


@pytest.mark.parametrize("name", BUILDS)
def test_a_source_that_does_not_build_the_model(rebuilt, name):
    source, kwargs, told = BUILDS[name]
    start, before = time.process_time(), torch.get_rng_state()
    with pytest.raises(ArtifactError, match=told) as error:
        rebuilt(kwargs, source)
    assert "Or pass a skeleton" in str(error.value) and len(str(error.value)) < 1500
    assert time.process_time() - start < 20
    assert torch.equal(torch.get_rng_state(), before)


# What "bounded memory" means: the address space has no room for what the file asks for
CHILD = """
import resource, sys, torch, timm, torchvision
import daqconvert as dq
size = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = 1024 * int(size) + (1 << 29)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        dq.load(path)
    except dq.errors.ArtifactError as error:
        print("refused", str(error).removeprefix(path))
"""
HUGE = (
    ("timm:test_vit", {"embed_dim": 4096, "depth": 100, "num_heads": 64, "mlp_ratio": 64.0, "num_classes": 4096}),
    ("timm:vit_giant_patch14_224", {}),
    ("torchvision:vgg19", {"num_classes": 4096}),
    ("torchvision:regnet_y_128gf", {}),  # cannot be built on meta
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits the address space")
def test_memory_is_bounded(from_timm, tmp_path):
    paths = []
    for i, (source, kwargs) in enumerate(HUGE):
        paths.append(shutil.copytree(from_timm, tmp_path / str(i)))
        edit(paths[-1], put("source", source))
        edit(paths[-1], put("source_kwargs", kwargs))
    done = python("-c", CHILD, *paths)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(HUGE), done.stderr[-2000:]
    assert all("model: expected a ResNet" in line for line in lines[:3])
    assert "larger than the stored tensors" in lines[3]


# ------------------------------------------------------------------------------------------- the same rule in `save`


@pytest.mark.parametrize(
    ("source", "kwargs", "told"),
    [
        (
            "timm:test_resnet",
            None,
            "source 'timm:test_resnet': plan: 'fc': expected.*Give the source and",
        ),
        ("timm:test_resnet", {"num_classes": 10, "checkpoint_path": "x"}, "source_kwargs.checkpoint_path"),
        ("timm:test_resnet", {"num_classes": 10, "act_layer": nn.ReLU}, "source_kwargs: expected numbers, texts"),
        ("timm:test_resnet", {"num_classes": 10, "drop_rate": float("nan")}, "source_kwargs.drop_rate: nan"),
        ("models:build", None, "an artifact names only timm:NAME or torchvision:NAME"),
        ("hf-hub:timm/resnet18", None, "an artifact names only timm:NAME or torchvision:NAME"),
        (None, {"num_classes": 10}, "source_kwargs: have no effect without source"),
    ],
)
def test_save_refuses_what_load_would(from_timm, tmp_path, source, kwargs, told):
    frozen = dq.load(from_timm)
    with pytest.raises(ArtifactError, match=told):
        dq.save(frozen, tmp_path / "a", source=source, source_kwargs=kwargs)
    assert list(tmp_path.iterdir()) == []


def test_arguments_are_stored_as_given(from_timm):
    assert read(from_timm)["source_kwargs"] == {"num_classes": 10}


def test_a_source_is_not_needed_with_a_skeleton(from_timm, tmp_path):
    refused(from_timm, "model: expected a ResNet, found a Sequential", model=small_network())
