"""The commands in docs/ could be typed: their options, presets and recipes exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from daqconvert.cli import app
from daqconvert.policy.presets import preset, preset_names
from daqconvert.sources import parse_source
from daqconvert.training import RECIPES, recipe
from helpers.pages import SHELLS, blocks, commands

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("imagenet.md", "training.md")


def typed(page):
    text = (DOCS / page).read_text("utf-8")
    return [command for language, block, _ in blocks(text) if language in SHELLS for command in commands(block)]


COMMANDS = [command for page in PAGES for command in typed(page)]


def parsed(arguments):
    """The options of a command as it reads them; nothing is run."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:])).params


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_can_be_typed(arguments):
    found = parsed(arguments)
    if found.get("model"):
        parse_source(found["model"])
    if found.get("preset"):
        preset(found["preset"])
    if found.get("recipe") in RECIPES:
        recipe(found["recipe"])
    else:
        assert found.get("recipe") is None or found["recipe"].endswith(".toml")


def test_every_row_of_the_papers_table_has_its_command_and_figure():
    """Presets, figures of METHOD's table, and commands are the same set, each once."""
    figures = {
        "1/1": 56.2,
        "1/2": 64.6,
        "2/2": 66.9,
        "3/3": 69.6,
        "4/4": 70.5,
        "1/32": 67.2,
        "2/32": 69.8,
        "3/32": 70.8,
    }
    text = (DOCS / "imagenet.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d) / (\d+) \| ([\d.]+) \| `--preset paper-w(\d)a(\d+)` \|$", text, re.MULTILINE)
    assert {f"{w}/{a}": float(top1) for w, a, top1, _, _ in rows} == figures
    assert all((w, a) == (found_w, found_a) for w, a, _, found_w, found_a in rows)
    found = [parsed(arguments) for arguments in typed("imagenet.md") if "--pretrained" in arguments]
    one = [
        options["preset"] for options in found if options["recipe"] == "paper-imagenet" and not options["batch_size"]
    ]
    assert sorted(one) == sorted(preset_names())
