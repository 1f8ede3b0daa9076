"""The README is true: its Python runs, from top to bottom, and its commands exist with the options they name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.pages import SHELLS, blocks, commands

README = Path(__file__).resolve().parents[2] / "README.md"


def readme_blocks() -> list[tuple[str, str, int]]:
    return blocks(README.read_text("utf-8")) if README.exists() else []


PYTHON = [(text, line) for language, text, line in readme_blocks() if language == "python"]
COMMANDS = [c for language, text, _ in readme_blocks() if language in SHELLS for c in commands(text)]


def test_readme_shows_code_and_commands():
    assert PYTHON
    assert COMMANDS


def test_readme_python_runs(tmp_path, monkeypatch):
    """All blocks in order and in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for text, line in PYTHON:
        exec(compile("\n" * line + text, str(README), "exec"), namespace)  # a traceback names the README's own line


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_readme_command_exists(arguments, child_env, tmp_path):
    """The subcommand has a help page, and that page knows every option of the command."""
    subcommand = [word for word in arguments[:1] if not word.startswith("-")]
    child = subprocess.run(
        [sys.executable, "-c", "from daqconvert.cli import main; main()", *subcommand, "--help"],
        env=child_env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    known = set(re.findall(r"--[a-z][a-z0-9-]*", child.stdout))
    assert options <= known, f"not options of daqconvert {' '.join(subcommand)}: {sorted(options - known)}"


@pytest.mark.parametrize(
    ("shell", "expected"),
    [
        pytest.param("$ daqconvert plan resnet18\nlayer type\n", [["plan", "resnet18"]], id="console with output"),
        pytest.param(
            "daqconvert eval runs/a --json | head # x\n", [["eval", "runs/a", "--json"]], id="pipe and comment"
        ),
        pytest.param(
            "daqconvert finetune \\\n  --out a && daqconvert inspect a",
            [["finetune", "--out", "a"], ["inspect", "a"]],
            id="two",
        ),
        pytest.param(".venv/bin/daqconvert --help", [["--help"]], id="path"),
        pytest.param("make demo", [], id="other"),
    ],
)
def test_commands_are_found(shell, expected):
    assert commands(shell) == expected


def test_blocks_are_found():
    assert blocks("a\n\n```python\nx = 1\n```\n```\nno\n```\n") == [("python", "x = 1\n", 3)]
