"""Reads a Markdown page: its blocks of code, and the commands of `daqconvert` in them."""

import re
import shlex
from pathlib import Path

FENCE = re.compile(r"^```(?P<language>\w+)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = {"console", "sh", "bash", "shell"}
SEPARATORS = {"|", "||", "&&", ";", "&", ">", ">>", "<"}


def blocks(markdown: str) -> list[tuple[str, str, int]]:
    """Fenced blocks as (language, text, number of lines before the text)."""
    return [
        (match["language"], match["text"], markdown.count("\n", 0, match.start("text")))
        for match in FENCE.finditer(markdown)
    ]


def commands(shell: str) -> list[list[str]]:
    """Return the arguments of every `daqconvert ...` in a shell block; if lines start with `$ `, those lines only."""
    lines = shell.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        arguments: list[str] | None = None
        for word in lexer:
            if word in SEPARATORS:
                arguments = None
            elif arguments is not None:
                arguments.append(word)
            elif Path(word).name == "daqconvert":
                arguments = []
                found.append(arguments)
    return found
