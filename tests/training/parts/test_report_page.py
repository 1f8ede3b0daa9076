"""The page in the directory of a run says how the run went."""

import html

import pytest

from helpers.written_runs import Stopped, train


def test_the_page_of_a_run(whole):
    out, result = whole
    page = (out / "report.html").read_text("utf-8")
    for said in (
        "Sequential, W2A2", "finished", f"best top-1 (epoch {result.best_epoch})", "recipe quick", "clip_grad",
        "of the weights oscillate", "3 of 3", "4 levels", "15 levels", "-again", "Changed from recipe quick",
    ):  # fmt: skip
        assert said in page, said
    assert "resume=True" not in page  # a finished run does not go on
    changed = page.split("Changed from recipe quick")[1].split("</table>")[0]
    assert "clip_grad" in changed
    assert "momentum" not in changed
    assert page.count('<div class="layer">') == 3


def test_a_run_that_is_interrupted_in_its_first_epoch_has_a_page(make, loader, val_loader, tmp_path):
    with pytest.raises(Stopped):
        train(make, loader, val_loader, tmp_path / "run", stop_at=2)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "epoch 0 of 4" in page
    assert "no epoch is done yet" in page
    assert f"out_dir={str(tmp_path / 'run')!r}, resume=True" in html.unescape(page)
    with pytest.raises(Stopped):
        train(make, loader, val_loader, tmp_path / "run", stop_at=20, resume=True)
    assert "epoch 1 of 4" in (tmp_path / "run" / "report.html").read_text("utf-8")
