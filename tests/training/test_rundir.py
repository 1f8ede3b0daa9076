"""The logs and reports of a run: the same after an interruption; training goes on if they cannot be written."""

import json
import logging
import re
import sys

import pytest

from daqconvert.training import finetune
from daqconvert.training.rundir import COLUMNS, Appended, csv_text
from helpers.written_runs import TIMES, Stopped, batches, scalars, table, train


def test_columns_of_the_history(whole):
    out, result = whole
    lines = table(out / "log.csv")
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    for line, row in zip(lines, result.history, strict=True):
        assert float(line["oscillating"]) == row["oscillating"] >= 0
        assert float(line["frozen"]) == row["frozen"]
        assert int(line["warnings"]) == row["warnings"]
    assert result.history[-1]["frozen"] > 0


@pytest.mark.parametrize("stop_at", [9, 31, 37])
def test_an_interruption_leaves_no_trace(make, loader, val_loader, tmp_path, whole, stop_at):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        train(make, loader, val_loader, out, stop_at)
    with (out / "steps.csv").open("a") as file:  # killed while it wrote a line
        file.write("77,9,0.5,0.1,0.1,1.0,10.0\n78,9,0.")
    with (out / "snapshots.jsonl").open("a") as file:
        file.write('{"epoch":9,"sites":{}}\n{"epoch":1,"si')
    train(make, loader, val_loader, out, resume=True)
    for name in ("steps.csv", "log.csv"):
        assert table(out / name) == table(whole[0] / name), name
    assert (out / "snapshots.jsonl").read_text() == (whole[0] / "snapshots.jsonl").read_text()
    ours, theirs = scalars(out), scalars(whole[0])
    assert ours.keys() == theirs.keys()
    assert all(ours[tag] == theirs[tag] for tag in ours if not tag.endswith(TIMES))
    shown = [re.sub(r"<h2>(Epochs|The run).*?</section>", "", _page(run)) for run in (out, whole[0])]
    assert _layers(shown[0]) == _layers(shown[1])


def _page(out):
    return (out / "report.html").read_text("utf-8")


def _layers(page):
    return page.split("<h2>Layers</h2>")[1].split("<h2>Epochs</h2>")[0]


def test_another_run_in_the_directory_starts_anew(make, loader, val_loader, tmp_path):
    train(make, loader, val_loader, tmp_path / "run", epochs=2)
    train(make, loader, val_loader, tmp_path / "run", epochs=1, overwrite=True)
    assert [line["step"] for line in table(tmp_path / "run" / "steps.csv")] == ["10"]
    assert len((tmp_path / "run" / "snapshots.jsonl").read_text().splitlines()) == 3
    assert [step for step, _ in scalars(tmp_path / "run")["step/loss"]] == [10]


def test_warnings_are_written_and_shown(make, loader, val_loader, tmp_path, caplog):
    model = make(2, first=(2, 8), last=(4, 8))
    out = tmp_path / "run"

    def harm(step):
        if step.number == 13:
            model[4].weight_quantizer.upper.data.fill_(-2.9)

    with caplog.at_level(logging.WARNING, "daqconvert.training"):
        result = finetune(model, batches(loader), val_loader, out_dir=out, epochs=3, on_step=harm)
    assert result.history[0]["warnings"] == 0
    assert result.history[1]["warnings"] >= 1
    found = [json.loads(line) for line in (out / "warnings.jsonl").read_text().splitlines()]
    assert (found[0]["epoch"], found[0]["layer"], found[0]["kind"]) == (2, "4", "weight range")
    assert "the range of its weights has shrunk" in _page(out)
    assert sum("the range of its weights" in record.getMessage() for record in caplog.records) == 1


def test_a_log_that_cannot_be_written_is_no_reason_to_stop(make, loader, val_loader, tmp_path, caplog):
    out = tmp_path / "run"
    for name in ("steps.csv", "snapshots.jsonl", "report.html"):
        (out / name).mkdir(parents=True)
    (out / "tensorboard").write_text("in the way")
    result = train(make, loader, val_loader, out, epochs=2, overwrite=True)
    assert result.epochs == 2
    told = [record.getMessage() for record in caplog.records]
    for name in ("steps.csv", "snapshots.jsonl", "report.html", "tensorboard"):
        assert sum(name in text for text in told) == 1, (name, told)


def test_without_tensorboard_and_matplotlib(make, loader, val_loader, tmp_path, monkeypatch):
    for name in ("tensorboard", "tensorboard.compat.proto", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    train(make, loader, val_loader, tmp_path / "run", epochs=1)
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert "daqconvert[plot]" in _page(tmp_path / "run")


def test_further_columns_come_last():
    text = csv_text([{"epoch": 1, "a": 2}, {"epoch": 2, "b": 3, "a": None}])
    assert text.splitlines()[0] == ",".join([*COLUMNS, "a", "b"])
    assert [line.split(",")[-2:] for line in text.splitlines()[1:]] == [["2", ""], ["", "3"]]


def test_damaged_lines_are_dropped(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"1\n\xff\n2\nthree\n4")
    assert Appended(path).keep(lambda line: int(line) > 0) == ["1", "2"]
    assert path.read_text() == "1\n2\n"
