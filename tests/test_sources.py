from __future__ import annotations

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from daqconvert.errors import ConversionError
from daqconvert.sources import Source, build_model, load_checkpoint, parse_source


@pytest.mark.parametrize(
    ("text", "kind", "name", "trusted"),
    [
        ("resnet18", "timm", "resnet18", True),
        ("timm:resnet18.a1_in1k", "timm", "resnet18.a1_in1k", True),
        (" torchvision:resnet18 ", "torchvision", "resnet18", True),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub", "timm/resnet18.a1_in1k", False),
        ("timm:hf-hub:timm/resnet18", "hf-hub", "timm/resnet18", False),
        ("my.models:build", "import", "my.models:build", False),
        ("os:system", "import", "os:system", False),
    ],
)
def test_parse(text, kind, name, trusted):
    source = parse_source(text)
    assert source == Source(kind, name)
    assert source.is_trusted_name is trusted
    assert parse_source(str(source)) == source


@pytest.mark.parametrize(
    "text",
    ["", "timm:", "a b", "timm:../x", "timm:local-dir:x", "torchvision:a:b", "hf-hub:x", "a:b:c", "a/b", "x:", ":f"],
)
def test_parse_refuses(text):
    with pytest.raises(ConversionError, match="expected timm:NAME"):
        parse_source(text)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("resnet1x", {}, r"timm has no model 'resnet1x'\. Nearest: resnet"),
        ("timm:resnet18.foo", {}, r"resnet18 has no weights 'foo'; it has a1_in1k"),
        ("torchvision:resnet19", {}, r"torchvision has no model 'resnet19'\. Nearest: resnet1"),
        ("shufflenet_v2_x1_0", {}, r"There is a torchvision:shufflenet_v2_x1_0"),
        ("torchvision:vit_tiny_patch16_224", {}, r"There is a timm:vit_tiny"),
        ("torchvision:resnet18", {"in_chans": 1}, r"could not be built with in_chans=1 \(TypeError"),
        ("test_resnet", {"depth": 9}, r"could not be built with depth=9"),
        ("hf-hub:timm/resnet18", {}, r"even its configuration is a download"),
        ("no_such_module:f", {}, r"no_such_module could not be imported: ModuleNotFoundError"),
        ("daqconvert.errors:neares", {}, r"no 'neares' in daqconvert\.errors\. Nearest: nearest"),
        ("daqconvert.errors:nearest", {}, r"cannot be called with \{\}: missing a required argument: 'name'"),
        ("daqconvert.spec:SETTING_NAMES", {}, r"expected a function that returns a module, found tuple"),
        ("daqconvert.spec:Settings", {}, r"expected it to return a torch.nn.Module, found Settings"),
    ],
)
def test_unknown_models(source, arguments, message):
    with pytest.raises(ConversionError, match=message):
        build_model(source, **arguments)


def test_builders_get_their_arguments():
    assert build_model("test_resnet", num_classes=3, in_chans=1)(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    assert build_model("torchvision:squeezenet1_1", num_classes=3)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_nothing_is_downloaded_unless_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # refuses at once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model("torchvision:fcn_resnet50")  # its backbone's weights are downloaded by default
        build_model("torchvision:googlenet", num_classes=2)  # warns about its start by default
    with pytest.raises(ConversionError, match=r"pretrained weights could not be had .*Check the connection"):
        build_model("torchvision:squeezenet1_1", pretrained=True)
    with pytest.raises(ConversionError, match=r"test_mambaout: .*No pretrained weights exist"):
        build_model("test_mambaout", pretrained=True)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models_for_test.py").write_text(
        "import torch\n"
        "def build(width=3, pretrained=False):\n"
        "    model = torch.nn.Linear(2, width)\n"
        "    model.was_pretrained = pretrained\n"
        "    return model\n"
        "def broken():\n"
        "    return 1 / 0\n"
        "class Family:\n"
        "    linear = staticmethod(lambda: torch.nn.Linear(1, 1))\n"
    )
    return "own_models_for_test"


def test_import_path_from_the_current_folder(own_module):
    assert build_model(f"{own_module}:build", width=5).out_features == 5
    assert build_model(f"{own_module}:build", pretrained=True).was_pretrained
    assert build_model(f"{own_module}:Family.linear").in_features == 1
    with pytest.raises(ConversionError, match=rf"broken failed: ZeroDivisionError: .* \({own_module}\.py, line 7\)"):
        build_model(f"{own_module}:broken")
    with pytest.raises(ConversionError, match=r"cannot be called with .*unexpected keyword argument 'depth'"):
        build_model(f"{own_module}:build", depth=1)


def state():
    torch.manual_seed(5)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "module."])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_checkpoint(tmp_path, wrap, suffix):
    weights = {k: v for k, v in state().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        prefix = wrap if wrap == "module." else ""
        save_file({prefix + k: v for k, v in weights.items()}, path)
    else:
        content = {"module." + k: v for k, v in weights.items()} if wrap == "module." else weights
        torch.save({"state_dict": content, "epoch": 3} if wrap == "state_dict" else content, path)
    model = build_model("test_resnet", checkpoint=path, num_classes=3)
    for name, value in state().items():
        assert torch.equal(model.state_dict()[name], value), name


def misshaped(weights):
    return {**weights, "fc.weight": torch.zeros(4, 96)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if not k.startswith("fc.")}, r"2 missing: fc\.weight, fc\.bias"),
        (lambda w: {**w, "extra.weight": torch.zeros(1)}, r"1 unexpected: extra\.weight"),
        (misshaped, r"1 of another shape: fc\.weight \(expected \(3, 96\), found \(4, 96\)\)"),
        (lambda w: {}, r"missing: conv1\.0\.weight, .*, \.\.\."),
    ],
    ids=["missing", "unexpected", "shape", "empty"],
)
def test_checkpoint_that_does_not_fit(tmp_path, change, message):
    path = tmp_path / "weights.safetensors"
    save_file(change(state()), path)
    model = timm.create_model("test_resnet", num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConversionError, match=r"weights\.safetensors does not fit ResNet: .*" + message):
        load_checkpoint(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_checkpoints_that_cannot_be_read(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(ConversionError, match="no such checkpoint file"):
        load_checkpoint(model, tmp_path / "none.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(ConversionError, match=r"whole\.pt could not be read as a torch file of tensors alone"):
        load_checkpoint(model, tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConversionError, match="expected a state dict, names to tensors; found list"):
        load_checkpoint(model, tmp_path / "list.pt")
    for name in ("a.safetensors", "a.pt"):
        for content in (b"", b"\x00" * 50, b"{}"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ConversionError, match="could not be read as"):
                load_checkpoint(model, tmp_path / name)
