"""The code on the page about deployment runs, in order, as it stands there."""

import re

import pytest


def test_page_runs(root, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "deployment.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for number, block in enumerate(blocks):
        try:
            exec(compile(block, f"deployment.md, block {number}", "exec"), scope)
        except Exception as error:
            pytest.fail(f"docs/deployment.md, block {number}: {error!r}")
    printed = capsys.readouterr().out
    assert "model.onnx" in printed
    assert "ONNX Runtime, 33 samples: agrees" in printed
