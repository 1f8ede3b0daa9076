"""docs/training.md is true: its blocks run, its table is the recipes', its columns are the log's."""

import re

import pytest
import torch

from daqconvert.training import RECIPES, recipe
from daqconvert.training.recipes import FIELDS, parse_overrides
from daqconvert.training.rundir import COLUMNS


@pytest.fixture(scope="module")
def page(root):
    return (root / "docs" / "training.md").read_text("utf-8")


def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
            exec(block, namespace)
    assert "2 epochs" in capsys.readouterr().out
    files = set(re.findall(r"^\| `([\w.]+)` \| ", page.split("## What is written")[1], re.MULTILINE))
    there = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert files - {"warnings.jsonl"} == there - {"warnings.jsonl"}  # written where there are some


def test_the_file_is_a_recipe(page, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(re.search(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1])
    assert recipe(path) == recipe("paper-cifar10", name="r.toml", epochs=50, clip_grad=1.0)


def test_the_table_is_the_recipes(page):
    header, *rows = re.findall(r"^\| (.*?) \|$", page.split("## Recipes")[1].split("##")[0], re.MULTILINE)
    names = re.findall(r"`([\w-]+)`", header)
    table = {cells[0].strip("`"): cells[1:] for cells in (row.split(" | ") for row in rows[0:]) if cells[0][0] == "`"}
    assert names == list(RECIPES)
    assert list(table) == list(FIELDS)[1:]
    for field, (*cells, meaning) in table.items():
        assert meaning == FIELDS[field].metadata["meaning"]
        for name, cell in zip(names, cells, strict=True):
            value = getattr(RECIPES[name], field)
            written = None if cell == "none" else parse_overrides([f"{field}={cell}"])[field]
            assert (value if value not in ("", ()) else None) == written, f"{field} of {name}"


def test_the_columns_are_the_logs(page):
    text = page.split("The columns of `log.csv`")[1].split("`on_epoch=`")[0]
    assert tuple(word for word in re.findall(r"`(\w+)`", text)) == COLUMNS
