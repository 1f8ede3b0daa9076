"""The page `docs/architecture.md`: picture and table show the real package, and every place that it names exists.

`pytest --overwrite-golden` draws the picture and writes the table anew.
"""

from __future__ import annotations

import ast
import re
import textwrap
from html import escape
from pathlib import Path

import pytest

from helpers.import_graph import Package
from test_architecture import FLOORS, PACKAGE

WIDTH, LABEL, MARGIN, LINE, CHARACTERS = 1040, 120, 10, 15, 29
BOX = 217  # of one room: as wide as `CHARACTERS` of its small text
STYLE = """
  .room { fill: #f6f8fa; stroke: #8c959f }
  .bar { fill: #57606a }
  text { font: 11px ui-monospace, monospace; fill: #57606a }
  .name { font-weight: 700; font-size: 13px; fill: #1f2328 }
  .floor { font: 600 13px system-ui, sans-serif; fill: #ffffff }
"""


@pytest.fixture(scope="module")
def package(root: Path) -> Package:
    return Package(root / "src" / PACKAGE)


def rooms_of(package: Package) -> dict[str, set[str]]:
    """Room -> the rooms whose modules it imports."""
    found: dict[str, set[str]] = {package.unit(module): set() for module in package.files}
    for module, targets in package.graph().items():
        found[package.unit(module)] |= {package.unit(target) for target in targets} - {package.unit(module)}
    return found


def first_sentence(package: Package, room: str) -> str:
    module = next(name for name in (f"{PACKAGE}.{room}", f"{PACKAGE}.{room}.__init__") if name in package.files)
    return (ast.get_docstring(package.trees[module]) or "").split("\n\n")[0].replace("\n", " ")


def shown(package: Package, room: str) -> str:
    """`layers/`, or `convert.py`."""
    return f"{room}/" if f"{PACKAGE}.{room}.__init__" in package.files else f"{room}.py"


def picture(package: Package) -> str:
    """Draw the floors, the lowest at the bottom: a box for each room, with the names of the rooms that it imports."""
    used, parts, y = rooms_of(package), [], MARGIN
    order = {room: i for i, room in enumerate(r for lines in FLOORS.values() for line in lines for r in line)}
    across = (WIDTH - LABEL - MARGIN) // (BOX + MARGIN)
    for floor, lines in reversed(FLOORS.items()):
        rooms = [room for line in lines for room in line]
        texts = {
            room: textwrap.wrap("uses " + ", ".join(sorted(used[room], key=order.__getitem__)), CHARACTERS)
            if used[room]
            else ["uses no other"]
            for room in rooms
        }
        top = y
        for start in range(0, len(rooms), across):
            row = rooms[start : start + across]
            height = LINE * (1 + max(len(texts[room]) for room in row)) + MARGIN
            for i, room in enumerate(row):
                x = LABEL + MARGIN + i * (BOX + MARGIN)
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{BOX}" height="{height}" rx="4" fill="#f6f8fa" stroke="#8c959f"/>'
                )
                parts.append(f'<text class="name" x="{x + 8}" y="{y + LINE}">{escape(shown(package, room))}</text>')
                parts += [
                    f'<text x="{x + 8}" y="{y + LINE * (2 + n)}">{escape(line)}</text>'
                    for n, line in enumerate(texts[room])
                ]
            y += height + MARGIN
        height = y - top - MARGIN
        parts.append(
            f'<rect x="{MARGIN}" y="{top}" width="{LABEL - MARGIN}" height="{height}" rx="4" fill="#57606a"/>'
        )
        parts.append(f'<text class="floor" x="{MARGIN + 8}" y="{top + LINE + 3}">{escape(floor)}</text>')
        y += MARGIN
    body = "\n".join(f"  {part}" for part in parts)
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="The floors of daqconvert">\n'
        f"  <style>{STYLE}  </style>\n"
        f'  <rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def table(package: Package) -> str:
    """Return a row for each room, from the lowest floor up: its floor, and the first line of its docstring."""
    rows = ["| floor | room | what it is |", "|---|---|---|"]
    for floor, lines in FLOORS.items():
        for i, room in enumerate(room for line in lines for room in line):
            rows.append(f"| {floor if i == 0 else ''} | `{shown(package, room)}` | {first_sentence(package, room)} |")
    return "\n".join(rows)


def test_the_picture_is_the_real_package(package, root, request):
    path = root / "docs" / "architecture.svg"
    if request.config.getoption("--overwrite-golden"):
        path.write_text(picture(package), "utf-8")
    assert path.read_text("utf-8") == picture(package), "imports have changed: draw anew with --overwrite-golden"


def test_the_table_is_the_real_package(package, root, request):
    path, expected = root / "docs" / "architecture.md", f"{table(package)}\n"
    before, start, rest = path.read_text("utf-8").partition("<!-- rooms -->\n")
    inside, end, after = rest.partition("<!-- end -->")
    assert start and end
    if request.config.getoption("--overwrite-golden"):
        inside = expected
        path.write_text(before + start + inside + end + after, "utf-8")
    assert inside == expected, "docstrings or rooms have changed: write the table anew with --overwrite-golden"


def named_places(page: str) -> list[tuple[str, str]]:
    """Return (file, name) of what the page writes as `room/file.py` `name`; the name is empty where none follows."""
    return re.findall(r"`([\w/]+\.py)`(?:,? `(\w+)`)?", page)


def test_every_place_that_the_page_names_is_there(package, root):
    page = (root / "docs" / "architecture.md").read_text("utf-8")
    missing = []
    for file, name in named_places(re.sub(r"<!-- rooms -->.*<!-- end -->", "", page, flags=re.DOTALL)):
        path = root / file if file.startswith("tests/") else root / "src" / PACKAGE / file
        if not path.is_file():
            missing.append(file)
            continue
        tree = ast.parse(path.read_text("utf-8"))
        if name and name not in {getattr(node, "name", None) for node in ast.walk(tree)}:
            missing.append(f"{file} {name}")
    assert not missing
    assert len(named_places(page)) > 30, "the page names its places as `room/file.py` `name`"
