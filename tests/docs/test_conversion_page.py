"""`docs/conversion.md` says what the code does: its blocks run, in order."""

import re


def test_every_block_of_the_page_runs(root):
    page = (root / "docs" / "conversion.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/conversion.md", "exec"), names)
    assert len(blocks) == 4
