"""Files that an earlier version wrote: artifacts, plans, policies and interrupted runs still give the same results.

`fixtures/make.py` wrote them and recorded their results. Outputs and weights are compared exactly if torch and the
processor are those of the recording. Elsewhere floats may be summed in another order, which can turn a rounding the
other way: then outputs agree to `FLOAT` and trained weights to `TRAINED`.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import daqconvert as dq
from daqconvert.policy.plan_json import plan_from_dict, plan_to_dict
from fixtures import networks as n

FLOAT = {"atol": 0.02, "rtol": 0.02}  # the effect of one other code of an input
TRAINED = {"atol": 0.02, "rtol": 0.02}  # the learning rate: one step in another direction
SINCE = {"final_a_sigma": 0.0}  # fields whose default is not what earlier versions, which lacked them, did
TIMINGS = ("seconds", "images_per_second")
ARTIFACTS = ("float", "integer", "timm")
VERSIONED = ('"daqconvert":', '"checksum":')

pytestmark = pytest.mark.usefixtures("one_thread")


def recorded(name: str) -> tuple[dict[str, Tensor], list[dict[str, Any]], bool]:
    """Return tensors, the log of the whole run, and whether this machine should give the same bits."""
    with safe_open(n.HERE / name, framework="pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    return tensors, json.loads(about["history"]), all(about[key] == value for key, value in n.machine().items())


def loaded(name: str) -> nn.Module:
    return dq.load(n.HERE / name, model=None if name == "timm" else n.everything)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_computes_what_it_did(name):
    tensors, _, same_machine = recorded("expected.safetensors")
    with torch.no_grad():
        found = loaded(name)(n.images(4))
    torch.testing.assert_close(found, tensors[name], **({"atol": 0, "rtol": 0} if same_machine else FLOAT))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_saved_again_has_the_same_bytes(name, tmp_path):
    source = {"source": n.TIMM, "source_kwargs": n.TIMM_OPTIONS} if name == "timm" else {}
    again = dq.save(loaded(name), tmp_path / "again", **source)
    assert (again / "model.safetensors").read_bytes() == (n.HERE / name / "model.safetensors").read_bytes()
    # a line for each field; the package's version may differ, and with it the checksum
    first, second = (
        [line for line in (folder / "daqconvert.json").read_text().splitlines() if not line.startswith(VERSIONED)]
        for folder in (n.HERE / name, again)
    )
    assert first == second


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_a_policy_gives_the_plan_it_did(deploy):
    text = (n.HERE / f"{deploy}.json").read_text()
    stored = plan_from_dict(json.loads(text))
    assert json.dumps(plan_to_dict(stored), indent=1) + "\n" == text
    assert dq.plan(n.everything(), policy=n.HERE / n.POLICY, deploy=deploy, example_inputs=n.images(1)) == stored


@pytest.mark.parametrize("deploy", ["float", "integer"])
def test_a_model_quantized_today_is_frozen_to_the_same_artifact(deploy, tmp_path):
    _, _, same_machine = recorded("expected.safetensors")
    qmodel = dq.quantize(n.everything(), policy=n.HERE / n.POLICY, deploy=deploy)
    dq.calibrate(qmodel, [n.images(16)], mode="eval")  # all that there was then
    path = dq.save(dq.freeze(qmodel), tmp_path / "today")
    found, expected = dq.load(path, model=n.everything).state_dict(), loaded(deploy).state_dict()
    assert list(found) == list(expected)
    if same_machine:
        assert [key for key, value in found.items() if not torch.equal(value, expected[key])] == []


@pytest.mark.parametrize(
    ("folder", "options", "record"),
    [
        pytest.param("run", n.RUN, "expected.safetensors", id="all parts"),
        pytest.param("earlier_run", {**n.EARLIER_RUN, **SINCE}, "expected_earlier_run.safetensors", id="fewer fields"),
    ],
)
def test_an_interrupted_run_ends_as_it_would_have(folder, options, record, tmp_path):
    tensors, history, same_machine = recorded(record)
    out_dir = shutil.copytree(n.HERE / folder, tmp_path / "run")
    qmodel = dq.quantize(n.trainable(), w_bits=2, a_bits=2)
    steps: list[int] = []
    note = lambda step: steps.append(step.number)  # noqa: E731
    result = dq.finetune(qmodel, *n.loaders(), out_dir=out_dir, resume=True, progress=False, on_step=note, **options)
    assert steps == list(range(n.STOPPED_IN, 13))  # it was resumed and did not start again
    found = {f"weights/{key}": value for key, value in qmodel.state_dict().items()}
    found |= {key: value.bool() for key, value in found.items() if key.endswith("calibrated")}  # a bool at that time
    expected = {key: value for key, value in tensors.items() if key in found}
    assert found.keys() == {key for key in tensors if key.startswith("weights/")}
    scalars = [
        key
        for key, value in expected.items()
        if value.dim() == 0 and key.endswith((".lower", ".upper", ".output_scale"))
    ]
    assert scalars  # these have shape (1,) now
    expected |= {key: expected[key].reshape(1) for key in scalars}
    torch.testing.assert_close(found, expected, **({"atol": 0, "rtol": 0} if same_machine else TRAINED))
    if same_machine:
        rows = [
            [{k: v for k, v in row.items() if k not in TIMINGS} for row in log] for log in (result.history, history)
        ]
        assert rows[0] == rows[1]
