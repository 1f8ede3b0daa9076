"""`daqconvert plan`: its options, policy files, the difference of two plans, plans of runs and artifacts."""

from __future__ import annotations

import pytest


def test_plan_of_a_model(daq):
    found = daq("plan", "test_resnet", "--w-bits", "2", "--a-bits", "float", "--first", "float", "--json").json
    rows = {row["site"]["name"]: row for row in found["rows"]}
    assert rows["conv1.0"]["settings"] is None
    assert (rows["layer1.0.conv1"]["settings"]["w_bits"], rows["layer1.0.conv1"]["settings"]["a_bits"]) == (2, None)
    assert found["macs"] > 10**8
    assert found["bytes"] < found["float_bytes"] / 4
    text = daq("plan", "test_resnet").out
    assert "layer4.0.conv2" in text
    assert "4 channel integer" in text


def test_plan_options_that_name_layers(daq):
    names = ("--include", "layer1.*", "--include", "layer4.*", "--exclude", "*.conv2")
    bits = ("--bits", "layer4.*=2/float", "--bits", "layer1.0.conv1=3", "--attention", "6", "--share-inputs")
    found = daq("plan", "test_resnet", *names, *bits, "--json").json
    rows = {row["site"]["name"]: row for row in found["rows"]}
    told = {name: row["settings"] for name, row in rows.items() if row["settings"]}
    assert all(name.startswith(("layer1.", "layer4.")) and "conv2" not in name for name in told)
    assert [told["layer4.0.conv1"][key] for key in ("w_bits", "a_bits", "share_inputs")] == [2, None, True]
    assert (told["layer1.0.conv1"]["w_bits"], told["layer1.0.conv1"]["a_bits"]) == (3, 3)
    assert (rows["conv1.0"]["reason"], rows["layer1.0.conv2"]["reason"]) == ("not included", "excluded")
    row = rows["layer1.0.conv1"]
    assert (row["bops"], row["float_bops"]) == (row["site"]["macs"] * 9, row["site"]["macs"] * 1024)
    assert row["weight_bytes"] < row["float_bytes"] / 10 and row["scale_bytes"] == 4 * row["site"]["out_channels"] + 5
    assert found["bops"] == sum(row["bops"] for row in rows.values()) and found["input_groups"] == {}
    assert found["params"] == found["float_bytes"] // 4


def test_plan_for_a_target(daq):
    assert "ResNet: policy arguments, target tensorrt, order" in daq("plan", "test_resnet", "--target", "tensorrt").out
    told = daq("plan", "test_resnet", "--target", "tensort").fails()
    assert "'tensort' is no target. Nearest: tensorrt" in told and "executorch, litert" in told
    told = daq("plan", "test_resnet", "--target", "litert", "--set", "deploy=float").fails()
    assert 'options: deploy = "float" contradicts target = "litert"' in told


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--bits", "fc"), "--bits 'fc': expected LAYER=W/A"),
        (("--bits", "fc=1/2/3"), "--bits 'fc=1/2/3': expected LAYER=W/A"),
        (("--bits", "fc=x"), "--bits fc= 'x': expected 1 to 8, or float."),
        (("--bits", "fcc=2"), 'bits: "fcc" matches no layer. Nearest: fc'),
        (("--include", "fcc"), 'include: "fcc" matches no layer. Nearest: fc'),
        (("--attention", "9"), "attention: expected the bits of both operands"),
        (("--attention", "yes"), "--attention 'yes': expected 1 to 8, or float."),
        (("--toml", "-", "--diff", "b.toml"), "--toml - and --diff would both print"),
        (("--diff", "missing.toml"), "missing.toml does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plan_options_refused(daq, option, told):
    assert told in daq("plan", "test_resnet", *option).fails()


def test_plan_as_a_policy_file(daq, tmp_path):
    asked = ("plan", "test_resnet", "--w-bits", "3", "--bits", "layer4.*=2", "--last", "float")
    path = tmp_path / "plans" / "a.toml"
    rows = daq(*asked, "--toml", path, "--json").json["rows"]
    again = daq("plan", "test_resnet", "--policy", path, "--json").json["rows"]
    assert [(row["settings"], row["reason"]) for row in again] == [(row["settings"], row["reason"]) for row in rows]
    assert daq(*asked, "--toml", "-").out == path.read_text()
    assert "exists. Pass --overwrite" in daq(*asked, "--toml", path).fails()
    assert "layer4.0.conv2" in daq(*asked, "--toml", path, "--overwrite").out


def test_plan_and_another(daq, tmp_path, finished):
    one, two = tmp_path / "a.toml", tmp_path / "b.toml"
    one.write_text("[default]\nw_bits = 4\na_bits = 4\n")
    two.write_text('[default]\nw_bits = 4\na_bits = 4\n[bits]\n"layer4.0.conv1" = [3, 4]\n')
    asked = ("plan", "test_resnet", "--policy", one)
    text = daq(*asked, "--diff", two).out
    assert text.startswith("layer4.0.conv1: w_bits 4 -> 3\n1 of 16 layers changed; bops ")
    found = daq(*asked, "--diff", two, "--json").json["diff"]
    assert found["changed"] == [{"name": "layer4.0.conv1", "what": {"w_bits": [4, 3]}}]
    assert found["before"]["bytes"] > found["after"]["bytes"]
    assert daq(*asked, "--diff", one).out == "no difference\n"
    assert daq("plan", finished, "--diff", finished / "artifact").out == "no difference\n"
    assert "a run or artifact is compared with another one" in daq("plan", finished, "--diff", two).fails()


def test_plan_of_a_run_and_of_an_artifact(daq, finished):
    of_run, of_artifact = (daq("plan", path, "--json").json for path in (finished, finished / "artifact"))
    assert of_run["rows"] == of_artifact["rows"]
    assert all(row["signed"] is not None for row in of_run["rows"])
    assert "--w-bits has no effect on a run" in daq("plan", finished, "--w-bits", "2").fails()
    for option in (("--include", "fc"), ("--bits", "fc=2"), ("--attention", "8"), ("--share-inputs",)):
        assert f"{option[0]} has no effect on a run" in daq("plan", finished, *option).fails()
    assert '[bits]\n"' not in daq("plan", finished, "--toml", "-").out  # all layers between the ends are alike


def test_policy_file(daq, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[default]\nw_bits = 4\na_bits = 4\n[[rule]]\nmatch = "layer4.*"\nw_bits = 2\n')
    rows = {row["site"]["name"]: row for row in daq("plan", "test_resnet", "--policy", policy, "--json").json["rows"]}
    assert rows["layer4.0.conv1"]["settings"]["w_bits"] == 2
    policy.write_text('[[rule]]\nmatch = "layer5.*"\nw_bits = 2\n')
    assert "layer5.*" in daq("plan", "test_resnet", "--policy", policy).fails()
