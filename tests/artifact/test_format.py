"""The bytes are those of docs/artifact.md: read by its prose alone, as small as it says, the same every time."""

import json
import struct

import numpy as np
import pytest
import torch
from torch import nn

import daqconvert as dq
from daqconvert.functional.packing import pack
from helpers import awkward_models as awkward
from helpers.artifacts import MANIFEST, TENSORS, checksum, frozen_of, read, small_network

# ------------------------------------------------- a reader of docs/artifact.md, in numpy, that knows nothing else

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1", "BOOL": "?"}


def stored_tensors(artifact):
    raw = (artifact / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    return {
        key: np.frombuffer(data[slice(*info["data_offsets"])], NUMPY[info["dtype"]]).reshape(info["shape"])
        for key, info in header.items()
    }


def codes_of(packed, bits, shape):
    count = int(np.prod(shape))
    planes = packed.reshape(bits, -1)
    codes = np.zeros(count, np.int64)
    for i in range(count):
        for plane in range(bits):
            codes[i] |= int(planes[plane][i // 8] >> (i % 8) & 1) << plane
    return codes.reshape(shape)


def decoded(artifact):
    """Key -> array, whole state dict, codes unpacked; and site name -> settings."""
    manifest = json.loads((artifact / "daqconvert.json").read_text(encoding="utf-8"))
    stored = stored_tensors(artifact)
    state = {}
    for key, entry in manifest["tensors"].items():
        source = entry.get("same_as", key)
        told = manifest["tensors"][source]
        state[key] = codes_of(stored[source], told["bits"], told["shape"]) if "bits" in told else stored[source]
    return state, {row["site"]["name"]: row["settings"] for row in manifest["plan"]["rows"] if row["settings"]}


def operand(codes, bits, grid):
    if grid == "twos":
        return codes - 2.0 ** (bits - 1)
    return 2 * codes - (2**bits - 1) if grid == "midrise" else codes - (2 ** (bits - 1) - 1)


def linear(state, name, settings, x):
    f = np.float32
    n, zero = 2 ** settings["a_bits"] - 1, f(state[f"{name}.input_zero_point"])
    q = np.clip(np.round(x / state[f"{name}.input_scale"]), -zero, n - zero)
    w = operand(state[f"{name}.weight_codes"], settings["w_bits"], settings["grid"]).astype(f)
    return (q @ w.T) * state[f"{name}.scale"] + state[f"{name}.bias"]


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("grid", ["midrise", "integer", "twos"])
def test_the_prose_is_enough_to_compute_an_output(bits, grid, tmp_path):
    if bits == 1:
        grid = "midrise"
    model = nn.Sequential(nn.Linear(7, 5), nn.Sigmoid(), nn.Linear(5, 3))
    both, x = {"w_bits": bits, "a_bits": max(bits, 2), "grid": grid}, torch.randn(6, 7)
    both["rounding"] = "lsq" if grid == "twos" else "daq"
    frozen = frozen_of(model, (x,), **both, first=both, last=both)
    state, settings = decoded(dq.save(frozen, tmp_path / "a"))
    for key, value in frozen.state_dict().items():
        assert np.array_equal(state[key], value.numpy()), key
    for name in ("0", "2"):
        layer, chosen = frozen.get_submodule(name), settings[name]
        assert np.array_equal(
            operand(state[f"{name}.weight_codes"], chosen["w_bits"], chosen["grid"]), layer.weight_operand().numpy()
        )
        inputs = torch.randn(4, layer.in_features)
        assert np.array_equal(linear(state, name, chosen, inputs.numpy()), layer(inputs).numpy())


def test_the_prose_is_enough_for_names_that_share_a_tensor(tmp_path):
    frozen = frozen_of(awkward.TwoNames(), (torch.randn(3, 4),), w_bits=3, a_bits=4)
    state, _ = decoded(dq.save(frozen, tmp_path / "a"))
    assert len(state) == 15 and len(stored_tensors(tmp_path / "a")) == 10
    for key, value in frozen.state_dict().items():
        assert np.array_equal(state[key], value.numpy()), key


def test_the_worked_example_of_the_page(root):
    page = (root / "docs" / "artifact.md").read_text(encoding="utf-8")
    packed = pack(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 2], dtype=torch.uint8), 3).tolist()
    planes = "   ".join(" ".join(f"{byte:02x}" for byte in packed[i : i + 2]) for i in (0, 2, 4))
    assert f"    {planes}\n" in page and "`0 1 2 3 4 5 6 7 5 2`" in page
    assert len(page.splitlines()) < 150


def test_the_page_names_every_field_and_dtype(root, original):
    from daqconvert.artifact.builders import LARGEST_NUMBER, MOST_VALUES, REFUSED_WORDS
    from daqconvert.artifact.manifest import DTYPES, LARGEST_MANIFEST, VERSION

    page = (root / "docs" / "artifact.md").read_text(encoding="utf-8")
    assert all(f"`{field}`" in page for field in read(original))
    assert f"version {VERSION}, in" in page and f"{LARGEST_MANIFEST >> 20} MiB" in page
    listed = page.split("name of the torch dtype: `")[1].split("`")[0].split()
    assert listed == ["float64", "float32", "float16", "bfloat16", *list(DTYPES)[4:]]
    words = page.split("one of the words *")[1].split("*")[0].replace("\n", " ").split(", ")
    assert sorted(word.strip() for word in words) == sorted(REFUSED_WORDS)
    assert f"above {LARGEST_NUMBER} and" in page and f"{MOST_VALUES} values" in page


def test_files_fields_and_checksum(original):
    assert sorted(path.name for path in original.iterdir()) == [MANIFEST, TENSORS]
    body = read(original)
    assert body["checksum"] == checksum(body)
    assert (body["format"], body["version"], body["dtype"]) == ("daqconvert-artifact", 1, "float32")


def data_bytes(artifact):
    """Bytes of a tensor file without its header."""
    raw = (artifact / TENSORS).read_bytes()
    return len(raw) - 8 - struct.unpack("<Q", raw[:8])[0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_size(bits, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3, bias=False))
    both = {"w_bits": bits, "a_bits": 8, "granularity": "channel"}
    frozen = frozen_of(model, (torch.randn(1, 3, 8, 8),), **both, first=both, last=both)
    packed = bits * -(-5 * 3 * 9 // 8) + bits * -(-7 * 5 * 9 // 8)
    per_layer = (4 + 1) * 2  # input scale and zero point
    rest = 4 * 5 + 4 * 5 + 4 * 7 + (4 * 4 * 5 + 8)  # bias and scales; batch norm with its int64 counter
    assert data_bytes(dq.save(frozen, tmp_path / "a")) == packed + per_layer + rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_model_gives_the_same_bytes(dtype, tmp_path):
    batch = (torch.randn(2, 3, 9, 9, dtype=dtype),)
    frozen = frozen_of(small_network().to(dtype), batch, w_bits=3, a_bits=4)
    paths = [dq.save(frozen, tmp_path / name) for name in "ab"]
    paths.append(dq.save(dq.load(paths[0], model=small_network()), tmp_path / "c"))
    paths.append(dq.save(frozen.to(memory_format=torch.channels_last), tmp_path / "d"))
    for file in (MANIFEST, TENSORS):
        assert len({(path / file).read_bytes() for path in paths}) == 1, file


def test_loaded_from_a_source_and_saved_again_gives_the_same_bytes(tmp_path):
    import timm

    model = timm.create_model("test_vit", num_classes=3).eval()
    frozen = frozen_of(model, (torch.randn(1, 3, 160, 160),), w_bits=4, a_bits=4)
    told = {"source": "timm:test_vit", "source_kwargs": {"num_classes": 3}}
    first = dq.save(frozen, tmp_path / "a", **told)
    second = dq.save(dq.load(first), tmp_path / "b", **told)
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in (MANIFEST, TENSORS))


def test_writing_into_the_file_does_not_change_what_was_loaded(artifact, frozen):
    loaded = dq.load(artifact, model=small_network())
    with (artifact / TENSORS).open("r+b") as file:
        file.write(b"\0" * (artifact / TENSORS).stat().st_size)
    assert all(torch.equal(value, frozen.state_dict()[key]) for key, value in loaded.state_dict().items())
