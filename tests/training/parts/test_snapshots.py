"""The files of a run that grow line by line: `steps.csv` and `snapshots.jsonl`."""

import json

from helpers.written_runs import table


def test_lines_by_step(whole):
    out, _ = whole
    lines = table(out / "steps.csv")
    assert [(int(line["step"]), int(line["epoch"])) for line in lines] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert all(float(line["grad_norm"]) > 0 for line in lines)
    assert float(lines[0]["loss"]) > float(lines[3]["loss"]) > 0
    assert float(lines[3]["lr"]) < float(lines[0]["lr"]) < 0.05


def test_snapshots_by_epoch(whole):
    out, _ = whole
    found = [json.loads(line) for line in (out / "snapshots.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in found] == [0, 1, 2, 3, 4, 4]
    assert found[0]["sites"]["4"]["weight"] == [-3.0, 3.0]
    assert found[4]["sites"]["4"]["weight"] != [-3.0, 3.0]
    assert found[4]["sites"]["6"]["bits"] == [4, 8]
    for line in (found[0], found[-1]):
        assert {name: (len(counts), sum(counts)) for name, counts in line["levels"].items()} == {
            "0": (4, 128),
            "4": (4, 256),
            "6": (15, 48),
        }
    assert found[0]["levels"] != found[-1]["levels"]
