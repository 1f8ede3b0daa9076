"""`daqconvert recipes`: all named recipes side by side; or one, by name or from a file, with what its fields mean."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from daqconvert.cli import options as o
from daqconvert.cli.output import Output
from daqconvert.report.tables import render, simple_table
from daqconvert.training import RECIPES, Recipe, recipe
from daqconvert.training.recipes import FIELDS

Name = Annotated[
    str | None, typer.Argument(help="One of them, or a TOML file. Default: all that have a name.", show_default=False)
]


def recipes_command(name: Name = None, as_json: o.Json = False) -> None:
    """Show the fields of the recipes; each can be changed by daqconvert finetune --with FIELD=VALUE."""
    with Output(as_json).capturing() as output:
        found = RECIPES if name is None else {name: recipe(name)}
        document = {title: one.to_dict() for title, one in found.items()}
        output.show(_one(found[name]) if name else _all(found), document)


def _all(found: dict[str, Recipe]) -> str:
    documents = [one.to_dict() for one in found.values()]
    names = [field for field in documents[0] if field != "name"]
    rows = [(field, *(_text(document[field]) for document in documents)) for field in names]
    hint = "daqconvert recipes NAME says what the fields are; daqconvert finetune --with FIELD=VALUE changes one."
    return f"{render(simple_table('', ('field', *found), rows))}\n{hint}"


def _one(chosen: Recipe) -> str:
    meanings = {name: field.metadata["meaning"].replace("`", "") for name, field in FIELDS.items()}
    rows = [(name, _text(value), meanings[name]) for name, value in chosen.to_dict().items()]
    return render(simple_table("", ("field", "value", ""), rows))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):  # names, or stages
        return (",".join(value) if all(isinstance(item, str) for item in value) else json.dumps(value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value) or "-"
