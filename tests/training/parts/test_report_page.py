"""The page in the directory of a run says how the run went."""


def test_the_page_of_a_run(whole):
    out, result = whole
    page = (out / "report.html").read_text("utf-8")
    for said in (
        "Sequential, W2A2", "finished", f"best top-1 (epoch {result.best_epoch})", "recipe quick", "clip_grad",
        "of the weights oscillate", "3 of 3", "4 levels", "15 levels", "resume=True", "-again",
    ):  # fmt: skip
        assert said in page, said
    assert page.count('<div class="layer">') == 3
